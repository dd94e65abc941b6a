"""Descent of G + F / λ with λ that grows: simple bilevel optimization by a penalty.

Solodov (2007), An explicit descent method for bilevel convex optimization, Journal of Convex
Analysis 14(2), 227, without its line search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import move
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, Needs, Optimizer, Params, Point, Stats


@component
class RisingPenalty:
    """∇x F + λ ∇x G, while y moves along ∇y G + ∇y F / λ: min F over argmin G, all variables in both.

    λ = strength · (call + 1)^growth. The steps of y have the scale of G, however large λ. With G and F
    convex y tends to a minimum of F over argmin G where λ grows without bound and Σ 1/λ is infinite,
    which 0 < growth ≤ 1 gives; on quadratics y is then off argmin G by O(1/λ). Along argmin G y
    moves by lr / λ a step, so that what is left there falls as calls^(−lr a / strength) at growth 1,
    where F curves by a, and faster than any power below 1. At growth 0 y stays off by O(1/strength).

    For problems of one variable at both levels: x is empty, and y is that variable. Where x is not,
    G is lowered in x as well, which a bilevel problem never asks for, and upper steps have to become
    shorter as λ grows. The exact gradient, at fixed y, of x ↦ F + λ G. Costs 2 gradients.
    """

    strength: PositiveFloat = 1.0
    growth: NonNegativeFloat = 0.5
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False, moves_lower=True)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def init(self, at: Point) -> dict[str, Any]:
        return {"calls": 0, "optimizer": self.optimizer.init(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        strength = self.strength * (state["calls"] + 1) ** self.growth
        F, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        along = tree.axpy(1 / strength, F_y, G_y)
        value = G.item() + F.item() / strength
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        state = {"calls": state["calls"] + 1, "optimizer": optimizer}
        return Estimate(tree.axpy(strength, G_x, F_x), F, state, Stats(), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y) + λ G(x, y) at fixed y and at the first call's λ."""
        return lambda x: losses.upper(x, at.y) + self.strength * losses.lower(x, at.y)
