"""The regularised value function, and F with a penalty or barrier that keeps G below it.

BVFSM: Liu, Liu, Zeng, Zhang and Zhang (2021), arXiv:2110.04974.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradient_x, gradients
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.lower.auxiliary import Auxiliary, begin, convergence_stats, exact, minimise
from bilevel.lower.lbfgs import LBFGS
from bilevel.types import Estimate, Losses, LowerSolver, Moved, Needs, Params, Point


@component
class ValueFunction:
    """∇x F + P'(gap) (∇x G(x, y) − ∇x G(x, z)), gap = G(x, y) − (G(x, z) + mu/2 ‖z‖²).

    z ≈ argmin of G(x, z) + mu/2 ‖z‖², and y ≈ argmin of F + P(gap) + theta/2 ‖y‖², which y is
    moved to. P is max(gap, 0)² / 2 sigma with penalty "quadratic", −sigma log(−gap) with "log",
    which stays strictly inside and so needs mu > 0. The exact gradient of x ↦ min over y of
    F + P(gap) + theta/2 ‖y‖², which tends to the optimistic Φ as mu, theta and sigma tend to 0;
    with one lower solution the quadratic penalty's distance to dΦ/dx is O(sigma^(1/3)) at
    mu = theta = 0, the barrier's O(√mu) as sigma falls. Each call divides mu, theta and sigma by
    (call + 1)^decay. P is steep, hence a `lower` with a line search; for "log" take newton, whose
    search turns back at the edge, or gradient with steps too short to cross it. No second
    derivative is taken but by a `lower` that uses them (newton). Costs 4 gradients, those of
    `lower` for z, and two for each one of `lower` for y.

    Raises:
        ProblemError: the barrier has no inside to start from.
    """

    penalty: Literal["quadratic", "log"] = "quadratic"
    sigma: PositiveFloat = 1e-2
    mu: NonNegativeFloat = 1e-3
    theta: NonNegativeFloat = 1e-3
    decay: NonNegativeFloat = 0.0
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=LBFGS)

    @model_validator(mode="after")
    def _turns_back_at_the_edge(self) -> Self:
        if self.penalty == "log" and isinstance(self.lower, LBFGS):
            raise ValueError(
                "lbfgs steps across the edge of penalty 'log', where it is not defined; use "
                "lower: newton, or gradient with a small lr"
            )
        return self

    @property
    def needs(self) -> Needs:
        # of values, as in zeroth_order
        rounding_amplification = 3 / self.sigma
        return Needs(
            second_order=False,
            moves_lower=True,
            rounding_amplification=rounding_amplification,
            rounding_remedy="a larger sigma",
        )

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> ValueFunction:
        """The same with both problems solved to rounding, and a barrier that Newton gets along."""
        if self.penalty == "quadratic":
            return replace(self, lower=exact(dim))
        if dim > 200:
            raise ProblemError("the barrier is held to its claim up to 200 lower variables only")
        return replace(self, lower=exact(dim), sigma=max(self.sigma, 1.0))

    def init(self, at: Point) -> dict[str, Any]:
        return {"calls": 0, "value": begin(self.lower, at.y), "upper": begin(self.lower, at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        now = self._after(state["calls"])
        z = now._solve_value(losses, at.x, state["value"])
        level = now._level(losses, at.x, z["y"])
        upper = now._solve_upper(losses, at.x, level, now._inside(losses, at.x, z, state["upper"]))
        here = Point(at.x, upper["y"])
        F, F_x, F_y = gradients(losses.upper, here)
        G, G_x, G_y = gradients(losses.lower, here)
        weight = now._slope(G.item() - level)
        h = tree.axpy(weight, tree.sub(G_x, gradient_x(losses.lower, at.x, z["y"])), F_x)
        left = tree.axpy(now.theta, here.y, tree.axpy(weight, G_y, F_y))
        value = F.item() + weight * G.item()
        moved = Moved(tree.clone(here.y), value, tree.norm(left), upper["steps"])
        state = {"calls": state["calls"] + 1, "value": z, "upper": upper}
        return Estimate(h, F, state, convergence_stats(z, upper), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate, at the first call."""

        def least(x: Params) -> Tensor:
            start = self.init(at)
            z = self._solve_value(losses, x, start["value"])
            level = self._level(losses, x, z["y"])
            start = self._inside(losses, x, z, start["upper"])
            y = self._solve_upper(losses, x, level, start)["y"]
            return self._penalised(losses, x, y, level)

        return least

    def _after(self, calls: int) -> ValueFunction:
        """Itself with the constants of a later call."""
        by = (calls + 1) ** self.decay
        return replace(self, sigma=self.sigma / by, mu=self.mu / by, theta=self.theta / by)

    def _solve_value(self, losses: Losses, x: Params, start: Auxiliary) -> Auxiliary:
        def regularised(x: Params, z: Params, batch: Any) -> Tensor:
            return losses.lower(x, z) + self.mu / 2 * _square(z)

        return minimise(self.lower, regularised, losses, x, start, itertools.repeat(None))

    def _level(self, losses: Losses, x: Params, z: Params) -> float:
        """What G is to stay below: its regularised minimum."""
        with torch.no_grad():
            return (losses.lower(x, z) + self.mu / 2 * _square(z)).item()

    def _solve_upper(self, losses: Losses, x: Params, level: float, start: Auxiliary) -> Auxiliary:
        def penalised(x: Params, y: Params, batch: Any) -> Tensor:
            return self._penalised(losses, x, y, level)

        return minimise(self.lower, penalised, losses, x, start, itertools.repeat(None), parts=2)

    def _inside(self, losses: Losses, x: Params, z: Auxiliary, start: Auxiliary) -> Auxiliary:
        """Where the solve for y starts: where the last one ended, or at z to be inside."""
        if self.penalty == "quadratic":
            return start
        level = self._level(losses, x, z["y"])
        for y in (start["y"], z["y"]):
            with torch.no_grad():
                if losses.lower(x, y).item() < level:
                    return start | {"y": y}
        raise ProblemError(
            f"value_function: penalty 'log' has no inside: min G + mu/2 ‖z‖² is at G itself with "
            f"mu = {self.mu:g}; raise mu, or use penalty: quadratic"
        )

    def _penalised(self, losses: Losses, x: Params, y: Params, level: float) -> Tensor:
        gap = losses.lower(x, y) - level
        if self.penalty == "quadratic":
            P = gap.clamp(min=0).square() / (2 * self.sigma)
        else:
            P = -self.sigma * torch.log(-gap)
        return losses.upper(x, y) + P + self.theta / 2 * _square(y)

    def _slope(self, gap: float) -> float:
        """P'(gap)."""
        return max(gap, 0.0) / self.sigma if self.penalty == "quadratic" else -self.sigma / gap


def _square(y: Params) -> Tensor:
    """‖y‖², with its graph."""
    return tree.summed(tree.map(Tensor.square, y))
