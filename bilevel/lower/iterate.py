"""Picard iteration of the problem's own map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import tree
from bilevel.calculus import fixed_point_maps
from bilevel.calculus.products import first_not_finite
from bilevel.components import component
from bilevel.errors import ConvergenceError
from bilevel.lower.start import BEGIN_ELSEWHERE
from bilevel.lower.tolerance import Stop
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Params


@component
class Iterate:
    """y ← T(x, y) with T the problem's `lower_map`, a new batch each, until ‖T − y‖ is small enough.

    Converges at the rate of the spectral radius of ∂y T. Each evaluation of T counts as one
    gradient. The loss reported is ½ ‖T − y‖², the gradient norm ‖T − y‖. No path.

    Raises:
        ProblemError: the problem has no `lower_map`.
        ConvergenceError: T − y is not finite; it says whether that was at the start.
    """

    steps: PositiveInt = 100
    tolerance: NonNegativeFloat | None = None
    """An absolute ‖T − y‖ to stop at, in the place of `relative_tolerance`."""
    relative_tolerance: PositiveFloat = 1e-8
    """‖T − y‖ relative to the largest ‖y‖ at which a solve began or ended, or that of y."""

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
        batch, shift, taken, converged = None, float("inf"), 0, False
        stop = Stop(self.tolerance, self.relative_tolerance, state, y)
        stop.curvature = 1.0  # T − y is of the scale of y
        while taken < self.steps and not converged:
            batch = next(batches)
            after = fixed_point_maps.evaluate(loss.on(batch), x, y)
            shift = tree.norm(tree.sub(after, y))
            if not shift < math.inf:
                _refuse(x, y, after, taken)
            taken, y = taken + 1, after
            converged = stop.is_met(shift, y)
        stopped = "tolerance" if converged else "iterations"
        stats = LowerStats(taken, taken, shift**2 / 2, shift, converged, stopped=stopped)
        return LowerSolution(tree.clone(y), stop.state(y), stats, batch)


def _refuse(x: Params, y: Params, after: Params, taken: int) -> None:
    """T(x, y) − y is not finite: the start is to blame, or T that does not contract."""
    blamed = first_not_finite({"x": x, "y": y, "lower_map(x, y)": after})
    what = "the step" if blamed is None else f"{blamed[0]}[{blamed[1]!r}]"
    found = "too large a norm" if blamed is None else blamed[2]
    if taken:
        raise ConvergenceError(
            f"iterate: {what} has {found} after {taken} steps: lower_map does not contract here; "
            "damp it, (1 − a) y + a T(x, y) with a < 1, or use lower: gradient"
        )
    raise ConvergenceError(f"{what} has {found}, before the first lower step; {BEGIN_ELSEWHERE}")
