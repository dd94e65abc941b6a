"""Differentiate one lower step. T1-T2: Luketina et al. (2016), arXiv:1511.06727, eq. 4-5.

DARTS: Liu, Simonyan and Yang (2019), arXiv:1806.09055, eq. 7-8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.finite_differences import cross_difference
from bilevel.calculus.products import gradient_y, gradients, linearize
from bilevel.components import component
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats


@component
class OneStep:
    """∇x F(x, y') − lr (∂²xy G(x, y))ᵀ ∇y F(x, y') at the virtual step y' = y − lr ∇y G(x, y).

    Exact for x ↦ F(x, y − lr ∇y G(x, y)); a biased estimate of dΦ/dx, which it approaches only as
    lr · ∂²yy G approaches the identity. Costs 2 gradients and 1 cross product. With
    `finite_difference` no second derivative is taken: the product is the central difference of
    ∇x G at y ± ε ∇y F with ε = epsilon / ‖∇y F‖ (DARTS, eq. 8), error O(ε²), 4 gradients.

    Raises:
        ProblemError: y is of a dtype too coarse for `epsilon`.
    """

    lr: PositiveFloat = 0.1
    finite_difference: bool = False
    epsilon: PositiveFloat = Field(default=1e-2)

    @property
    def needs(self) -> Needs:
        return Needs(second_order=not self.finite_difference)

    @property
    def claim(self) -> Literal["step"]:
        return "step"

    def tight(self, dim: int) -> OneStep:
        """The same with a difference so small that its truncation error cannot be seen."""
        return replace(self, epsilon=min(self.epsilon, 1e-4))

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        if self.finite_difference:
            _, G_y = gradient_y(losses.lower, at.x, at.y)
            value, F_x, F_y = gradients(losses.upper, self._stepped(at, G_y))
            cross = cross_difference("one_step", losses.lower, at, F_y, self.epsilon)
        else:
            lower = linearize(losses.lower, at)
            value, F_x, F_y = gradients(losses.upper, self._stepped(at, lower.gradient))
            cross = lower.vjp_xy(F_y)
        return Estimate(tree.axpy(-self.lr, cross, F_x), value, state, Stats(iterations=1))

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y − lr ∇y G(x, y)), the function this estimator claims to differentiate."""

        def stepped(x: Params) -> Tensor:
            _, G_y = gradient_y(losses.lower, x, at.y)
            return losses.upper(x, self._stepped(at, G_y).y)

        return stepped

    def _stepped(self, at: Point, G_y: Params) -> Point:
        return Point(at.x, tree.axpy(-self.lr, G_y, at.y))
