"""Newton's method with the full Hessian on the lower level, for small smooth problems."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.errors import ConvergenceError
from bilevel.linear.dense import matrix
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import Stop
from bilevel.scalars.functions import call
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Params, Point, Stopped


@component
class Newton:
    """y − t H⁻¹∇y G, t halved until G falls enough (Armijo); quadratic convergence; dim(y) HVPs a step.

    Where H is not positive definite its eigenvalues are replaced by their absolute values, at
    least 1e-8 of the largest, so that every step descends (Nocedal and Wright 2006, sec. 3.4).
    Stops where ‖∇y G‖ is small enough, after `steps` steps, or where rounding stops the descent.
    The first solve takes 1 gradient for the scale of G. Draws one batch a solve. No path.

    Raises:
        ConvergenceError: G, ∇y G or ∂²yy G is not finite; it says whether that was at the start.
    """

    needs_whole: ClassVar[str] = "lower: gradient with optimizer: adam"
    steps: PositiveInt = 50
    tolerance: NonNegativeFloat | None = None
    """An absolute ‖∇y G‖ to stop at, in the place of `relative_tolerance`."""
    relative_tolerance: PositiveFloat = 1e-10
    """‖∇y G‖ relative to curvature times ‖y‖ (`bilevel.lower.tolerance`)."""

    @property
    def offers(self) -> Offers:
        return Offers()

    def init(self, y: Params) -> dict[str, Any]:
        return {}

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
        batch = next(batches)
        loss, taken, hvps, spent = loss.on(batch), 0, 0, 0
        stop = Stop(self.tolerance, self.relative_tolerance, state, y)
        while True:
            with at_start(taken):
                lower = calculus.linearize(loss, Point(x, y))
            value, norm = lower.value.item(), tree.norm(lower.gradient)
            if not norm < math.inf:
                require_finite(loss, x, y, lower.gradient, taken)
            if taken == 0 and stop.is_relative:
                spent = stop.begin(loss, x, y, lower.gradient)
            converged = stop.is_met(norm, y)
            stopped: Stopped = "tolerance" if converged else "iterations"
            if converged or taken == self.steps:
                break
            taken += 1
            direction, stop.curvature = _direction(matrix(lower.hvp_yy, y), lower.gradient)
            hvps += tree.size(y)
            y, moved = _search(loss, x, y, direction, value, tree.dot(direction, lower.gradient))
            if not moved:
                stopped = "stagnation"
                break
        gradients = taken + 1 + spent
        stats = LowerStats(taken, gradients, value, norm, converged, hvps, stopped=stopped)
        return LowerSolution(tree.detach(y), stop.state(y), stats, batch)


def _direction(hessian: torch.Tensor, gradient: Params) -> tuple[Params, float]:
    """(−|H|⁻¹ g, the largest |eigenvalue| of H)."""
    hessian = tree.wide(hessian)
    if not bool(hessian.isfinite().all()):
        raise ConvergenceError(
            "newton: ∂²yy G is not finite where ∇y G is, as that of |y|^1.5 at 0; begin elsewhere, or "
            "use lower: lbfgs or gradient, which need no second derivative"
        )
    values, vectors = call(torch.linalg.eigh, (hessian + hessian.T) / 2)
    size = values.abs()
    largest = size.max()
    # what is positive definite beyond the rounding of its products is taken as it is
    rounding = len(size) * tree.eps(gradient)
    least = rounding if values.min() > rounding * largest else 1e-8
    size = torch.maximum(size, largest * least + torch.finfo(size.dtype).tiny)
    g = tree.wide(tree.flatten(gradient))
    return tree.cast(-(vectors @ ((vectors.T @ g) / size)), gradient), largest.item()


def _search(
    loss: Loss, x: Params, y: Params, direction: Params, value: float, slope: float
) -> tuple[Params, bool]:
    """(new y, whether it moved). The full step is taken when rounding hides the decrease."""
    noise = 10 * torch.finfo(next(iter(y.values())).dtype).eps * max(abs(value), 1e-30)
    t = 1.0
    for _ in range(30):
        trial = tree.axpy(t, direction, y)
        with torch.no_grad():
            new = loss(x, trial).item()
        if new <= value + 1e-4 * t * slope + noise:
            return trial, True
        t /= 2
    return y, False
