"""Reptile. Nichol, Achiam and Schulman (2018), arXiv:1803.02999, alg. 2."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats
from bilevel.unrolling.path import advance, pull_start, recorded_from_x


@component
class Reptile:
    """x − y_K, the mean over the copies of x that y_0 consists of; 0 gradients.

    A direction to descend along, the gradient of no function: to lowest orders in the step size
    it mixes that of the loss with that of MAML (Nichol et al. 2018, sec. 5). F is evaluated once,
    to be reported; G alone decides.

    Raises:
        ProblemError: the lower level does not start at copies of the whole of x.
    """

    @property
    def needs(self) -> Needs:
        start = frozenset({"lower_start"})
        return Needs(second_order=False, path=math.inf, requires=start)

    @property
    def claim(self) -> Literal["path"] | None:
        return None

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        path = recorded_from_x(at, "reptile")
        y = advance(path, losses.lower, at.x, 0).start
        copies, totals, moved = (
            pull_start(path, losses.lower, at.x, cotangent)
            for cotangent in (tree.map(torch.ones_like, y), y, tree.sub(y, at.y))
        )
        _require_copies(at.x, copies, totals)
        with torch.no_grad():
            value = calculus.value(losses.upper, at.x, at.y)
        return Estimate(tree.div(moved, copies), value, state, Stats(iterations=len(path.batches)))


def _require_copies(x: Params, copies: Params, totals: Params) -> None:
    """Σ over the copies of x = their number times x, or the start is something else than copies."""
    for name, entry in x.items():
        count = copies[name]
        if not (count > 0).all() or not torch.allclose(totals[name], count * entry, rtol=1e-3):
            raise ProblemError(
                f"reptile moves x towards y, so the lower level must start at copies of it; "
                f"{name} is not copied into lower_start. Use estimator=fomaml or unroll"
            )
