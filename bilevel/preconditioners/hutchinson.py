"""Hutchinson's estimate of the diagonal as a preconditioner.

Bekas, Kokiopoulou and Saad (2007), Appl. Numer. Math. 57.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt

from bilevel import rng, tree
from bilevel.components import component
from bilevel.preconditioners.rebuild import RebuildRule
from bilevel.types import Matvec, Params, Point, System


@component
class Hutchinson:
    """M = diag(|d|), d the mean of z · A z over random signs z; entries at least `floor` of the largest.

    `probes` products when it is built, and again when the iterations spent beyond the fewest since
    then exceed what building costs. The estimate is unbiased; entry i has variance
    Σ_{j ≠ i} A_ij² / probes, exact for diagonal A.
    """

    probes: PositiveInt = 10
    floor: PositiveFloat = 1e-6
    seed: int = 0

    def init(self, at: Point) -> dict[str, Any]:
        return {"built": 0, **RebuildRule().state()}

    def prepare(
        self, system: System, state: dict[str, Any]
    ) -> tuple[Matvec | None, dict[str, Any]]:
        rule = RebuildRule(**{k: state[k] for k in ("fewest", "excess")}).after(system.spent)
        if not state["built"] or rule.excess > self.probes:
            d = self._estimate(system, state["built"])
            state = {"built": state["built"] + 1, "diagonal": d}
            rule = RebuildRule()
        d = state["diagonal"]
        kept = {"built": state["built"], "diagonal": d, **rule.state()}
        return lambda r: tree.div(r, d), kept

    def _estimate(self, system: System, built: int) -> Params:
        stream, total = rng.stream(self.seed, f"hutchinson.{built}"), tree.zeros_like(system.b)
        for _ in range(self.probes):
            signs = tree.drawn(lambda p: rng.signs(p, stream), system.b)
            tree.axpy_(total, 1 / self.probes, tree.mul(signs, system.matvec(signs)))
        size = tree.map(torch.abs, total)
        largest = tree.largest(size)
        least = self.floor * largest if largest > 0 else 1.0
        return tree.map(lambda entry: entry.clamp(min=least), size)
