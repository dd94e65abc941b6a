"""Proximal gradient with momentum. FISTA: Beck and Teboulle (2009), SIAM J. Imaging Sci. 2(1).

Restarted by the gradient test of O'Donoghue and Candès (2015), arXiv:1204.3982.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.calculus.fixed_point_maps import Backward, backward_of, require_like
from bilevel.components import component
from bilevel.errors import ConvergenceError
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import Stop, curvature_along
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Params


@component
class Proximal:
    """y₊ = P(z − lr ∇y G(z)), P the problem's `prox_lower` or `project_lower`, z ahead of y by momentum.

    Minimises G + R, or G over a set. `lr` is halved until G lies below its quadratic bound of
    curvature 1 / lr, so that any start will do, and is kept from call to call. Momentum starts
    again where it points uphill: linear convergence with no knowledge of the curvature; off with
    `accelerate: false`. Stops by ‖z − y₊‖ / lr, which is ‖∇y G‖ where there is no P.
    One gradient a step, one more in the first solve where `lr` is None, and one value of G a trial.
    Draws one batch a solve. No path.

    Raises:
        ConvergenceError: no `lr` down to 1e-20 of the first lies below the bound.
    """

    steps: PositiveInt = 100
    lr: PositiveFloat | None = None
    """The first step; None takes 1 / curvature of G along its gradient at the start."""
    tolerance: NonNegativeFloat | None = None
    """An absolute ‖∇y G‖ to stop at, in the place of `relative_tolerance`."""
    relative_tolerance: PositiveFloat = 1e-8
    """‖∇y G‖ relative to curvature times ‖y‖ (`bilevel.lower.tolerance`)."""
    accelerate: bool = True

    @property
    def offers(self) -> Offers:
        return Offers(supports=frozenset({"project_lower", "prox_lower"}))

    def init(self, y: Params) -> dict[str, Any]:
        return {} if self.lr is None else {"lr": self.lr}

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
        loss, lr, z, t, taken, spent = loss.on(batch), state.get("lr"), y, 1.0, 0, 0
        value, shift, converged = float("nan"), float("nan"), False
        stop = Stop(self.tolerance, self.relative_tolerance, state, y)
        while taken < self.steps and not converged:
            with at_start(taken):
                at_z, g = calculus.gradient_y(loss, x, z)
            value = at_z.item()
            require_finite(loss, x, z, g, taken)
            if lr is None:
                spent, lr = 1, 1 / (curvature_along(loss, x, z, g) or 1.0)
            after, lr = self._step(loss, x, z, (value, g), lr)
            taken, move = taken + 1, tree.sub(after, z)
            shift = tree.norm(move) / lr
            stop.curvature = 1 / lr  # what its bound has
            converged = stop.is_met(shift, after)
            ahead = tree.sub(after, y)
            uphill = tree.dot(move, ahead) < 0
            t_next = 1.0 if uphill else (1 + (1 + 4 * t * t) ** 0.5) / 2
            weight = 0.0 if uphill or not self.accelerate else (t - 1) / t_next
            y, z, t = after, tree.axpy(weight, ahead, after), t_next
        stopped = "tolerance" if converged else "iterations"
        stats = LowerStats(taken, taken + spent, value, shift, converged, stopped=stopped)
        return LowerSolution(tree.clone(y), {"lr": lr, **stop.state(y)}, stats, batch)

    def _step(
        self,
        loss: Loss,
        x: Params,
        z: Params,
        at_z: tuple[float, Params],
        lr: float,
    ) -> tuple[Params, float]:
        """(P(z − lr g), the lr that was short enough)."""
        value, g = at_z
        resolution = tree.eps(z) ** 0.5 * abs(value)
        least = 1e-20 * lr
        while lr > least:
            after = _moved(x, tree.axpy(-lr, g, z), backward_of(loss, lr))
            move = tree.sub(after, z)
            slope, bend = tree.dot(g, move), tree.dot(move, move) / (2 * lr)
            if abs(slope) + bend <= resolution:
                return after, lr  # rounding in G would decide; a step too long soon grows out of it
            with torch.no_grad():
                if loss(x, after).item() <= value + slope + bend:
                    return after, lr
            lr /= 2
        raise ConvergenceError(
            f"proximal: no step down to lr = {lr:.1g} keeps lower_loss below its quadratic bound: "
            "lower_loss has no gradient there that says how it falls (a kink belongs in prox_lower)"
        )


@torch.no_grad()
def _moved(x: Params, z: Params, backward: Backward | None) -> Params:
    if backward is None:
        return z
    after = backward(x, z)
    require_like(after, z, "prox_lower or project_lower")
    return after
