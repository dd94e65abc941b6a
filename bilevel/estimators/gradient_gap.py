"""Descent in x and y on F plus a penalty on the norm of the lower gradient.

G-PBGD: Shen and Chen (2023), arXiv:2302.05185, the penalty ‖∇y G‖².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradient_y, gradients, linearize
from bilevel.components import Slot, component
from bilevel.lower.auxiliary import move
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, Needs, Optimizer, Params, Point, Stats


@component
class GradientGap:
    """∇x F + 2λ (∂²xy G)ᵀ ∇y G, while y moves along ∇y F / λ + 2 (∂²yy G) ∇y G.

    The exact gradient, at fixed y, of x ↦ F(x, y) + λ ‖∇y G(x, y)‖². At any y but the one that
    the run settles at it does not estimate dΦ/dx: at y* it is ∇x F alone. Where x and y rest, x is
    off a stationary point of Φ by O(1/λ), if ∂²yy G is not singular there. Nothing is solved, but
    second derivatives are taken. Costs 2 gradients, 1 HVP and 1 cross product.
    """

    strength: PositiveFloat = 10.0
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)

    @property
    def needs(self) -> Needs:
        rounding_amplification = 2 * self.strength
        return Needs(
            moves_lower=True,
            rounding_amplification=rounding_amplification,
            rounding_remedy="a smaller strength",
        )

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def init(self, at: Point) -> dict[str, Any]:
        return {"optimizer": self.optimizer.init(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        F, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        g = lower.gradient
        h = tree.axpy(2 * self.strength, lower.vjp_xy(g), F_x)
        along = tree.axpy(1 / self.strength, F_y, tree.scale(2.0, lower.hvp_yy(g)))
        value = F.item() / self.strength + tree.dot(g, g)
        moved, optimizer = move(self.optimizer, losses, at, along, value, state["optimizer"])
        return Estimate(h, F, {"optimizer": optimizer}, Stats(), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate."""

        def penalised(x: Params) -> Tensor:
            _, g = gradient_y(losses.lower, x, at.y)
            square = torch.as_tensor(tree.dot(g, g), dtype=torch.float64)
            return losses.upper(x, at.y) + self.strength * square

        return penalised
