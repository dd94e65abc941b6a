"""Descent of F inside argmin G, by a dynamic barrier on G: simple bilevel optimization.

Gong, Liu and Liu (2021), Bi-objective Trade-off with Dynamic Barrier Gradient Descent, NeurIPS,
openreview.net/forum?id=817F5yuNAf1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import barrier_strength, move
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, Needs, Optimizer, Params, Point, Stats


@component
class DynamicBarrier:
    """∇x F + λ ∇x G, while y moves along ∇y F + λ ∇y G: min F over argmin G, all variables in both.

    λ = max(0, (φ − ⟨∇F, ∇G⟩) / ‖∇G‖²) over x and y together: the smallest change of ∇F whose
    product with ∇G is at least φ = barrier · ‖∇G‖², so that G falls. Where `lowest` is given, φ =
    min(rate · (G − lowest), barrier · ‖∇G‖²): G at `lowest`, above its minimum, is a constraint
    G ≤ lowest, and below it F alone may raise G. λ grows without bound as ∇G tends to 0; with a
    constant step y then stays off argmin G by O(lr), of one residual alone not; where ∇G is no more
    than rounding, so is λ.

    For problems of one variable at both levels: x is empty, and y is that variable. Where x is not,
    G is lowered in x as well, which a bilevel problem never asks for. The exact gradient, at fixed
    y and at this λ, of x ↦ F + λ G. Let lr of `optimizer` be that of the upper optimizer where x is
    not empty. Costs 2 gradients.
    """

    barrier: PositiveFloat = 0.5
    lowest: float | None = None
    """min G, or the largest G that is accepted; None where it is not known."""
    rate: PositiveFloat | None = None
    """Of G's fall towards `lowest`, which it needs: G − lowest falls as exp(−rate · lr · steps)."""
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)

    @model_validator(mode="after")
    def _lowest_and_rate_belong_together(self) -> Self:
        if (self.lowest is None) != (self.rate is None):
            given, missing = ("rate", "lowest") if self.lowest is None else ("lowest", "rate")
            raise ValueError(f"{given} without {missing}: give both, or neither")
        return self

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
        strength = self._strength(G.item(), (F_x, F_y), (G_x, G_y))
        along = tree.axpy(strength, G_y, F_y)
        moved, optimizer = move(self.optimizer, losses, at, along, G.item(), state["optimizer"])
        h = tree.axpy(strength, G_x, F_x)
        return Estimate(h, F, {"optimizer": optimizer}, Stats(), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y) + λ G(x, y) at fixed y and at the λ of this point."""
        _, F_x, F_y = gradients(losses.upper, at)
        G, G_x, G_y = gradients(losses.lower, at)
        strength = self._strength(G.item(), (F_x, F_y), (G_x, G_y))
        return lambda x: losses.upper(x, at.y) + strength * losses.lower(x, at.y)

    def _strength(
        self, G: float, F_xy: tuple[Params, Params], G_xy: tuple[Params, Params]
    ) -> float:
        if self.lowest is None or self.rate is None:
            return barrier_strength(F_xy, G_xy, self.barrier)
        return barrier_strength(F_xy, G_xy, self.barrier, most=self.rate * (G - self.lowest))
