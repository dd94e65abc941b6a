"""Hypergradients from first derivatives: the penalised lower problem.

F2SA: Kwon, Kwon, Wright and Nowak (2023), arXiv:2301.10945. Central differences: F2SA-p,
Chen, Li, Chayti and Zhang (2025), arXiv:2509.02937.
"""

from __future__ import annotations

import itertools
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
    begin,
    convergence_stats,
    exact,
    minimise,
    penalty_needs,
)
from bilevel.lower.gradient import Gradient
from bilevel.types import Estimate, Losses, LowerSolver, Needs, Params, Point


@component
class Penalty:
    """∇x F(x, y_λ) + λ (∇x G(x, y_λ) − ∇x G(x, y)) with y_λ ≈ argmin over y of G + F / λ.

    The exact gradient of x ↦ λ (min over y of (G + F / λ) − G(x, y)); at the lower solution its
    distance to dΦ/dx is O(1/λ) (Kwon et al. 2023, lemma 3.1). `central` takes (∇φ₊ − ∇φ₋) λ / 2
    of φ± = min over y of G ± F / λ instead, which is O(1/λ²) and needs λ large enough for G − F/λ
    to stay convex, or the penalised solve does not converge. No second derivative is taken but
    by a `lower` that uses them (newton). Costs 3 gradients and those of `lower`,
    which minimises the penalised loss, warm-started; twice that with `central`.

    `Stats.residual` is ‖λ ∇y G + ∇y F‖ / ‖∇y F‖ at y_λ (with `central` the larger of the two), what
    the penalised problem is left with: to first order in 1/λ the residual of the adjoint system at
    v = λ (y − y_λ), where y is solved. 1 at a y_λ that has not left y.
    """

    strength: PositiveFloat = 100.0
    central: bool = False
    lower: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=Gradient)

    @property
    def needs(self) -> Needs:
        return penalty_needs(self.strength, moves_lower=False)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> Penalty:
        """The same with the penalised problems solved to rounding."""
        return replace(self, lower=exact(dim))

    def init(self, at: Point) -> dict[str, Auxiliary]:
        signs = ("plus", "minus") if self.central else ("plus",)
        return {sign: begin(self.lower, at.y) for sign in signs}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Auxiliary]) -> Estimate:
        plus = self._solve(losses, at.x, state["plus"], 1 / self.strength)
        value, F_x, G_x, left = self._ends(losses, Point(at.x, plus["y"]), 1)
        if not self.central:
            gap = tree.sub(G_x, gradient_x(losses.lower, at.x, at.y))
            h = tree.axpy(self.strength, gap, F_x)
            return Estimate(
                h, value, {"plus": plus}, replace(convergence_stats(plus), residual=left)
            )
        minus = self._solve(losses, at.x, state["minus"], -1 / self.strength)
        _, F_below, G_below, left_below = self._ends(losses, Point(at.x, minus["y"]), -1)
        F_sum = tree.add(F_x, F_below)
        h = tree.axpy(self.strength / 2, tree.sub(G_x, G_below), tree.scale(0.5, F_sum))
        stats = replace(convergence_stats(plus, minus), residual=max(left, left_below))
        return Estimate(h, value, {"plus": plus, "minus": minus}, stats)

    def _ends(self, losses: Losses, at: Point, sign: int) -> tuple[Tensor, Params, Params, float]:
        """(F, ∇x F, ∇x G, what the penalised problem is left with, relative) at its solution."""
        value, F_x, F_y = gradients(losses.upper, at)
        _, G_x, G_y = gradients(losses.lower, at)
        left = tree.norm(tree.axpy(sign * self.strength, G_y, F_y))
        return value, F_x, G_x, left / (tree.norm(F_y) or 1.0)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate."""

        def least(x: Params, sign: int) -> Tensor:
            y = self._solve(losses, x, self.init(at)["plus"], sign / self.strength)["y"]
            return losses.lower(x, y) + sign / self.strength * losses.upper(x, y)

        def gap(x: Params) -> Tensor:
            if self.central:
                return self.strength / 2 * (least(x, 1) - least(x, -1))
            return self.strength * (least(x, 1) - losses.lower(x, at.y))

        return gap

    def _solve(self, losses: Losses, x: Params, start: Auxiliary, weight: float) -> Auxiliary:
        """argmin over y of G + weight · F."""

        def penalised(x: Params, y: Params, batch: Any) -> Tensor:
            return losses.lower(x, y) + weight * losses.upper(x, y)

        return minimise(self.lower, penalised, losses, x, start, itertools.repeat(None), parts=2)
