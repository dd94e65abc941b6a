"""Descent in x, y and multipliers on F plus a penalty on the doubly regularised gap function.

GAFFA: Yao, Yin, Zeng and Zhang (2024), arXiv:2406.01992; elsewhere called GAFFO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
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
from bilevel.types import Estimate, Loss, Losses, LowerSolver, Needs, Optimizer, Params, Point


@component
class RegularisedGap:
    """∇x F + λ (∇x L(x, y, μ) − ∇x L(x, θ, z)) with L = G + zᵀd and d ≤ 0 the lower constraints.

    μ = max(z + γ₂ d(x, y), 0), and θ ≈ argmin of L(x, θ, z) + ‖θ − y‖² / 2γ₁ by `lower` from the
    last θ, one gradient step by default, as published. y moves along
    ∇y F / λ + ∇y L(x, y, μ) − (y − θ) / γ₁, and the multipliers z, kept in
    [0, multiplier_bound], by multiplier_lr along (μ − z) / γ₂ − d(x, θ). Equalities are the same
    without the max and with z of either sign. The exact gradient, at fixed y and z, of x ↦ F + λ ·
    gap, the gap being the largest value of L(x, y, μ) − L(x, θ, z) − ‖θ − y‖² / 2γ₁ −
    ‖μ − z‖² / 2γ₂; at any y but the one that the run settles at it does not estimate dΦ/dx. G and
    d have to be convex in y. λ = strength · (call + 1)^growth. Without constraints it is `moreau`.
    No second derivative is taken but by a `lower` that uses them (newton). Costs 3 gradients of
    L or F and those of `lower`.
    """

    strength: PositiveFloat = 10.0
    growth: NonNegativeFloat = 0.0
    gamma1: PositiveFloat = 1.0
    gamma2: PositiveFloat = 1.0
    multiplier_lr: PositiveFloat = 0.1
    multiplier_bound: PositiveFloat = 100.0
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=one_step)

    @property
    def needs(self) -> Needs:
        return penalty_needs(self.strength, supports=("lower_constraints", "project_lower"))

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> RegularisedGap:
        """The same with θ to rounding."""
        return replace(self, lower=exact(dim))

    def init(self, at: Point) -> dict[str, Any]:
        proximal, optimizer = begin(self.lower, at.y), self.optimizer.init(at.y)
        return {"calls": 0, "proximal": proximal, "z": {}, "optimizer": optimizer}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        strength = self.strength * (state["calls"] + 1) ** self.growth
        d = _constraints(losses.lower, at.x, at.y)
        z = state["z"] or tree.zeros_like(d)
        mu = self._largest(z, d)
        proximal = self._solve(losses, at, z, state["proximal"])
        theta = Point(at.x, proximal["y"])
        F, F_x, F_y = gradients(losses.upper, at)
        L, L_x, L_y = gradients(_lagrangian(losses.lower, mu), at)
        gap_x = tree.sub(L_x, gradient_x(_lagrangian(losses.lower, z), at.x, theta.y))
        pull = tree.sub(at.y, theta.y)
        along = tree.axpy(1 / strength, F_y, tree.axpy(-1 / self.gamma1, pull, L_y))
        value = L.item() + F.item() / strength
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        after = {
            "calls": state["calls"] + 1,
            "proximal": proximal,
            "z": self._moved(z, mu, _constraints(losses.lower, at.x, theta.y)),
            "optimizer": optimizer,
        }
        return Estimate(
            tree.axpy(strength, gap_x, F_x), F, after, convergence_stats(proximal), moved
        )

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """F + λ · gap at fixed y, and at z = 0, where the multipliers start."""

        def penalised(x: Params) -> Tensor:
            d = _constraints(losses.lower, x, at.y)
            z = tree.zeros_like(d)
            mu = self._largest(z, d)
            theta = self._solve(losses, Point(x, at.y), z, begin(self.lower, at.y))["y"]
            above = _lagrangian(losses.lower, mu)(x, at.y) - proximity(mu, z, self.gamma2)
            below = _lagrangian(losses.lower, z)(x, theta) + proximity(theta, at.y, self.gamma1)
            return losses.upper(x, at.y) + self.strength * (above - below)

        return penalised

    def _largest(self, z: Params, d: Params) -> Params:
        """argmax over μ of μᵀd − ‖μ − z‖² / 2γ₂, μ ≥ 0 for inequalities."""
        return _signed(tree.axpy(self.gamma2, d, z), lambda mu: mu.clamp(min=0))

    def _moved(self, z: Params, mu: Params, at_theta: Params) -> Params:
        """z after its step, within its bounds."""
        along = tree.axpy(1 / self.gamma2, tree.sub(mu, z), tree.scale(-1.0, at_theta))
        limit = self.multiplier_bound
        stepped = tree.map(
            lambda part: part.clamp(-limit, limit), tree.axpy(-self.multiplier_lr, along, z)
        )
        return _signed(stepped, lambda part: part.clamp(min=0))

    def _solve(self, losses: Losses, at: Point, z: Params, start: Auxiliary) -> Auxiliary:
        """argmin over θ of L(x, θ, z) + ‖θ − y‖² / 2γ₁."""
        lower = _lagrangian(losses.lower, z)

        def proximal(x: Params, theta: Params, batch: Any) -> Tensor:
            return lower.on(batch)(x, theta) + proximity(theta, at.y, self.gamma1)

        return minimise(self.lower, proximal, losses, at.x, start, batches_of(losses.lower))


def _constraints(loss: Loss, x: Params, y: Params) -> Params:
    """The lower constraints at a point, with no graph; none where the problem has none."""
    if loss.structure.constraints is None:
        return {}
    with torch.no_grad():
        return loss.structure.constraints(x, y, loss.batch)


def _lagrangian(loss: Loss, multipliers: Params) -> Loss:
    """(x, y) ↦ G + multipliersᵀ d."""
    constraints = loss.structure.constraints
    if constraints is None:
        return loss

    def lagrangian(x: Params, y: Params, batch: Any) -> Tensor:
        d = constraints(x, y, batch)
        return (
            loss.function(x, y, batch)
            + torch.stack([(multipliers[name] * part).sum() for name, part in d.items()]).sum()
        )

    return replace(loss, function=lagrangian)


def _signed(multipliers: Params, change: Callable[[Tensor], Tensor]) -> Params:
    """`change` made to the multipliers of the inequalities."""
    return {n: change(part) if n == "inequality" else part for n, part in multipliers.items()}
