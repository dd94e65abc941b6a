"""Newton's method with the full Hessian on the lower level, for small smooth problems."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.errors import ConvergenceError
from bilevel.linear.dense import matrix
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import limit
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Params, Point


@component
class Newton:
    """y − t H⁻¹∇y G, t halved until G falls enough (Armijo); quadratic convergence; dim(y) HVPs a step.

    Where H is not positive definite its eigenvalues are replaced by their absolute values, at
    least 1e-8 of the largest, so that every step descends (Nocedal and Wright 2006, sec. 3.4).
    Stops at ‖∇y G‖ ≤ tolerance, after `steps` steps, or where rounding stops the descent.
    Draws one batch a solve. No path.

    Raises:
        ConvergenceError: G, ∇y G or ∂²yy G is not finite; it says whether that was at the start.
    """

    steps: PositiveInt = 50
    tolerance: NonNegativeFloat = 1e-10
    relative_tolerance: PositiveFloat | None = None
    """In the place of `tolerance`: that many times the largest ‖∇y G‖ at which a solve began so far."""

    @property
    def offers(self) -> Offers:
        return Offers()

    def init(self, y: Params) -> dict[str, Any]:
        return {"reference": 0.0}

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
        loss, taken, hvps = loss.on(batch), 0, 0
        tolerance, reference = self.tolerance, 0.0
        while True:
            with at_start(taken):
                lower = calculus.linearize(loss, Point(x, y))
            value, norm = float(lower.value), tree.norm(lower.gradient)
            if not math.isfinite(norm):
                require_finite(loss, x, y, lower.gradient, taken)
            if taken == 0:
                tolerance, reference = limit(self.tolerance, self.relative_tolerance, state, norm)
            if norm <= tolerance or taken == self.steps:
                break
            taken += 1
            direction = _direction(matrix(lower.hvp_yy, y), lower.gradient)
            hvps += tree.size(y)
            y, moved = _search(loss, x, y, direction, value, tree.dot(direction, lower.gradient))
            if not moved:
                break
        stats = LowerStats(taken, taken + 1, value, norm, norm <= tolerance, hvps)
        return LowerSolution(tree.detach(y), {"reference": reference}, stats, batch)


def _direction(hessian: torch.Tensor, gradient: Params) -> Params:
    hessian = tree.wide(hessian)
    if not bool(hessian.isfinite().all()):
        raise ConvergenceError(
            "newton: ∂²yy G is not finite where ∇y G is, as that of |y|^1.5 at 0; begin elsewhere, or "
            "use lower: lbfgs or gradient, which need no second derivative"
        )
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    size = values.abs()
    size = size.clamp(min=float(size.max()) * 1e-8 + torch.finfo(size.dtype).tiny)
    g = tree.wide(tree.flatten(gradient))
    return tree.cast(-(vectors @ ((vectors.T @ g) / size)), gradient)


def _search(
    loss: Loss, x: Params, y: Params, direction: Params, value: float, slope: float
) -> tuple[Params, bool]:
    """(new y, whether it moved). The full step is taken when rounding hides the decrease."""
    noise = 10 * torch.finfo(next(iter(y.values())).dtype).eps * max(abs(value), 1e-30)
    t = 1.0
    for _ in range(30):
        trial = tree.axpy(t, direction, y)
        with torch.no_grad():
            new = float(loss(x, trial))
        if new <= value + 1e-4 * t * slope + noise:
            return trial, True
        t /= 2
    return y, False
