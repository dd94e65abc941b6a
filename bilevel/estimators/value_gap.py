"""Descent in x and y on F plus a penalty on the gap of the lower value.

V-PBGD: Shen and Chen (2023), arXiv:2302.05185, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
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
    penalty_needs,
)
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, LowerSolver, Needs, Optimizer, Params, Point


@component
class ValueGap:
    """∇x F + λ (∇x G(x, y) − ∇x G(x, z)), z ≈ argmin over z of G(x, z); y moves along ∇y G + ∇y F / λ.

    The exact gradient, at fixed y, of x ↦ F(x, y) + λ (G(x, y) − min over z of G(x, z)). At any y
    but the one that the run settles at it does not estimate dΦ/dx: at y* it is ∇x F alone. Where
    x and y rest, x is off a stationary point of Φ by O(1/λ). y is moved by one step of
    `optimizer`; the paper's step α in y is lr / λ here, so that lr may be what suits G, whatever
    λ. No second derivative is taken but by a `lower` that uses them (newton). Costs 3 gradients
    and those of `lower`, which resumes from the last z.
    """

    strength: PositiveFloat = 10.0
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=Gradient)

    @property
    def needs(self) -> Needs:
        return penalty_needs(self.strength)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> ValueGap:
        """The same with the lower level solved to rounding."""
        return replace(self, lower=exact(dim))

    def init(self, at: Point) -> dict[str, Any]:
        return {"lowest": begin(self.lower, at.y), "optimizer": self.optimizer.init(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        lowest = self._solve(losses, at.x, state["lowest"])
        F, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        gap = tree.sub(G_x, gradient_x(losses.lower, at.x, lowest["y"]))
        h = tree.axpy(self.strength, gap, F_x)
        along = tree.axpy(1 / self.strength, F_y, G_y)
        value = G.item() + F.item() / self.strength
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        state = {"lowest": lowest, "optimizer": optimizer}
        return Estimate(h, F, state, convergence_stats(lowest), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate."""

        def penalised(x: Params) -> Tensor:
            z = self._solve(losses, x, begin(self.lower, at.y))["y"]
            gap = losses.lower(x, at.y) - losses.lower(x, z)
            return losses.upper(x, at.y) + self.strength * gap

        return penalised

    def _solve(self, losses: Losses, x: Params, start: Auxiliary) -> Auxiliary:
        lower = losses.lower
        return minimise(self.lower, lower.function, losses, x, start, batches_of(lower))
