"""The baseline without an implicit term: descend F in x and G in y in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from bilevel.calculus.products import gradients
from bilevel.components import component
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats


@component
class Alternating:
    """∇x F(x, y) at fixed y. 1 gradient.

    Wrong by the whole implicit term (∂²xy G)ᵀ v; exact only where F does not depend on y* through
    x. Where x does not enter F directly it is zero and x never moves.
    """

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False)

    @property
    def claim(self) -> Literal["direct"]:
        return "direct"

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y) at fixed y, the function this estimator claims to differentiate."""
        return lambda x: losses.upper(x, at.y)

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, _ = gradients(losses.upper, at)
        return Estimate(F_x, value, state, Stats())
