"""Descent in x and y on F plus a penalty on G less its Moreau envelope.

MEHA: Liu, Liu, Yao, Zeng and Zhang (2024), arXiv:2405.09927; elsewhere called MESO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradient_x, gradients
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import (
    Auxiliary,
    batches_of,
    begin,
    convergence_stats,
    exact,
    minimise,
    move,
    one_step,
    penalty_needs,
    proximity,
)
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, LowerSolver, Needs, Optimizer, Params, Point


@component
class Moreau:
    """∇x F + λ (∇x G(x, y) − ∇x G(x, θ)); y moves along ∇y F / λ + ∇y G(x, y) − (y − θ) / γ.

    θ ≈ argmin of G(x, θ) + ‖θ − y‖² / 2γ, the proximal point, by `lower` from the last θ: one
    gradient step by default, as published. γ = `gamma` below 1 / (the weak convexity of G) makes
    that problem strongly convex where G is not convex. The exact gradient, at fixed y, of
    x ↦ F(x, y) + λ (G(x, y) − min over θ of (G(x, θ) + ‖θ − y‖² / 2γ)); at any y but the one that
    the run settles at it does not estimate dΦ/dx. Where x and y rest, x is off a stationary point
    of Φ by O(1/λ). λ = strength · (call + 1)^growth, the paper's c_k. y is moved by one step of
    `optimizer`, at the old x where the paper has the new one. No second derivative is taken but by
    a `lower` that uses them (newton). Costs 3 gradients and those of `lower`.
    """

    strength: PositiveFloat = 10.0
    growth: NonNegativeFloat = 0.0
    gamma: PositiveFloat = 1.0
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=one_step)

    @property
    def needs(self) -> Needs:
        return penalty_needs(self.strength)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> Moreau:
        """The same with the proximal point to rounding."""
        return replace(self, lower=exact(dim))

    def init(self, at: Point) -> dict[str, Any]:
        optimizer = self.optimizer.init(at.y)
        return {"calls": 0, "proximal": begin(self.lower, at.y), "optimizer": optimizer}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        strength = self.strength * (state["calls"] + 1) ** self.growth
        proximal = self._solve(losses, at, state["proximal"])
        F, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        gap = tree.sub(G_x, gradient_x(losses.lower, at.x, proximal["y"]))
        pull = tree.sub(at.y, proximal["y"])
        along = tree.axpy(1 / strength, F_y, tree.axpy(-1 / self.gamma, pull, G_y))
        value = G.item() + F.item() / strength - tree.dot(pull, pull) / (2 * self.gamma)
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        state = {"calls": state["calls"] + 1, "proximal": proximal, "optimizer": optimizer}
        h = tree.axpy(strength, gap, F_x)
        return Estimate(h, F, state, convergence_stats(proximal), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate, at the first call."""

        def penalised(x: Params) -> Tensor:
            here = Point(x, at.y)
            theta = self._solve(losses, here, begin(self.lower, at.y))["y"]
            envelope = losses.lower(x, theta) + proximity(theta, at.y, self.gamma)
            return losses.upper(x, at.y) + self.strength * (losses.lower(x, at.y) - envelope)

        return penalised

    def _solve(self, losses: Losses, at: Point, start: Auxiliary) -> Auxiliary:
        """argmin over θ of G(x, θ) + ‖θ − y‖² / 2γ."""
        lower = losses.lower

        def proximal(x: Params, theta: Params, batch: Any) -> Tensor:
            return lower.on(batch)(x, theta) + proximity(theta, at.y, self.gamma)

        return minimise(self.lower, proximal, losses, at.x, start, batches_of(lower))
