"""The baseline of one level: descend F + weight · G in x and y together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import move
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, Needs, Optimizer, Params, Point, Stats


@component
class Joint:
    """∇x F + weight · ∇x G, while y moves along ∇y F + weight · ∇y G. 2 gradients.

    The exact gradient of F + weight · G in (x, y), and of no bilevel problem: it rests where
    that sum is stationary, however large `weight`. It makes x lower G as well, which a bilevel
    problem never asks for, and where G has no minimum in x it has no limit at all.
    """

    weight: PositiveFloat = 1.0
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False, moves_lower=True)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def init(self, at: Point) -> dict[str, Any]:
        return {"optimizer": self.optimizer.init(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        F, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        h = tree.axpy(self.weight, G_x, F_x)
        along = tree.axpy(self.weight, G_y, F_y)
        value = F.item() + self.weight * G.item()
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        return Estimate(h, F, {"optimizer": optimizer}, Stats(), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y) + weight · G(x, y) at fixed y."""
        return lambda x: losses.upper(x, at.y) + self.weight * losses.lower(x, at.y)
