"""Picard iteration of the problem's own map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.calculus import fixed_point_maps
from bilevel.components import component
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Params


@component
class Iterate:
    """y ← T(x, y) with T the problem's `lower_map`, a new batch each; stops at ‖T − y‖ ≤ tolerance.

    Converges at the rate of the spectral radius of ∂y T. Each evaluation of T counts as one
    gradient. The loss reported is ½ ‖T − y‖², the gradient norm ‖T − y‖. No path.

    Raises:
        ProblemError: the problem has no `lower_map`.
    """

    steps: PositiveInt = 100
    tolerance: NonNegativeFloat = 1e-8

    @property
    def offers(self) -> Offers:
        return Offers()

    def init(self, y: Params) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
    ) -> LowerSolution:
        batch, shift, taken = None, float("inf"), 0
        while taken < self.steps and shift > self.tolerance:
            batch = next(batches)
            after = fixed_point_maps.evaluate(loss.on(batch), x, y)
            taken, shift, y = taken + 1, tree.norm(tree.sub(after, y)), after
        stats = LowerStats(taken, taken, shift**2 / 2, shift, shift <= self.tolerance)
        return LowerSolution(tree.clone(y), state, stats, batch)
