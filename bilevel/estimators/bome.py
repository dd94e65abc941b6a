"""BOME: descent of F in x and y under a dynamic barrier on the gap of the lower value.

Liu, Ye, Wright, Stone and Liu (2022), arXiv:2209.08709, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import (
    Auxiliary,
    barrier_strength,
    batches_of,
    begin,
    convergence_stats,
    exact,
    minimise,
    move,
)
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, LowerSolver, Needs, Optimizer, Params, Point


@dataclass(frozen=True)
class _Parts:
    """F, q = G(x, y) − G(x, z) with z held fixed, and their gradients at a point."""

    F: Tensor
    F_x: Params
    F_y: Params
    q: float
    q_x: Params
    q_y: Params
    lowest: Auxiliary


@component
class Bome:
    """∇x F + λ ∇x q with q = G(x, y) − G(x, z), z ≈ argmin of G(x, ·); y moves along ∇y F + λ ∇y q.

    λ = max(barrier − ⟨∇F, ∇q⟩ / ‖∇q‖², 0) over x and y together: the smallest change of ∇F whose
    product with ∇q is at least barrier · ‖∇q‖², so that q falls. z comes from y by `lower` and
    is held fixed, in ∇y q too. The exact gradient, at fixed y and at this λ, of
    x ↦ F(x, y) + λ (G(x, y) − min over z of G(x, z)). As q tends to 0, λ grows without bound and
    x tends to a stationary point of Φ. It is meant for equal steps in x and y: let lr of
    `optimizer` be that of the upper optimizer. No second derivative is taken but by a `lower`
    that uses them (newton). Costs 3 gradients and those of `lower`.
    """

    barrier: PositiveFloat = 0.5
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=Gradient)

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False, moves_lower=True)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> Bome:
        """The same with the lower level solved to rounding."""
        return replace(self, lower=exact(dim))

    def init(self, at: Point) -> dict[str, Any]:
        return {"optimizer": self.optimizer.init(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        parts = self._parts(losses, at)
        strength = self._strength(parts)
        h = tree.axpy(strength, parts.q_x, parts.F_x)
        along = tree.axpy(strength, parts.q_y, parts.F_y)
        value = parts.F.item() + strength * parts.q
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        return Estimate(
            h, parts.F, {"optimizer": optimizer}, convergence_stats(parts.lowest), moved
        )

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """F + λ q at fixed y and at the λ of this point, with z solved for at every x."""
        strength = self._strength(self._parts(losses, at))

        def penalised(x: Params) -> Tensor:
            z = self._solve(losses, Point(x, at.y))["y"]
            gap = losses.lower(x, at.y) - losses.lower(x, z)
            return losses.upper(x, at.y) + strength * gap

        return penalised

    def _parts(self, losses: Losses, at: Point) -> _Parts:
        lowest = self._solve(losses, at)
        F, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        least, at_lowest, _ = gradients(losses.lower, Point(at.x, lowest["y"]))
        return _Parts(F, F_x, F_y, (G - least).item(), tree.sub(G_x, at_lowest), G_y, lowest)

    def _strength(self, at: _Parts) -> float:
        return barrier_strength((at.F_x, at.F_y), (at.q_x, at.q_y), self.barrier)

    def _solve(self, losses: Losses, at: Point) -> Auxiliary:
        lower, start = losses.lower, begin(self.lower, at.y)
        return minimise(self.lower, lower.function, losses, at.x, start, batches_of(lower))
