"""Hypergradients from first derivatives: the penalised lower problem.

F2SA: Kwon, Kwon, Wright and Nowak (2023), arXiv:2301.10945. Central differences: F2SA-p,
arXiv:2509.02937.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus import gradient_x, gradients
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.types import (
    Estimate,
    Loss,
    Losses,
    LowerSolver,
    Needs,
    Params,
    Point,
    Slot,
    Stats,
    component,
)


@component
class Penalty:
    """∇x F(x, y_λ) + λ (∇x G(x, y_λ) − ∇x G(x, y)) with y_λ ≈ argmin over y of G + F / λ.

    The exact gradient of x ↦ λ (min over y of (G + F / λ) − G(x, y)); at the lower solution its
    distance to dΦ/dx is O(1/λ) (Kwon et al. 2023, lemma 3.1). `central` takes (∇φ₊ − ∇φ₋) λ / 2
    of φ± = min over y of G ± F / λ instead, which is O(1/λ²) and needs λ large enough for G − F/λ
    to stay convex, or the penalised solve does not converge. No second derivative is taken but
    by a `solver` that uses them (newton). Costs 3 gradients and those of `solver`,
    which minimises the penalised loss, warm-started; twice that with `central`.
    """

    strength: PositiveFloat = 100.0
    central: bool = False
    solver: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=Gradient)

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> Penalty:
        """The same with the penalised problems solved to rounding."""
        small = dim <= 200
        return replace(self, solver=Newton() if small else LBFGS(steps=2000, tolerance=1e-9))

    def init(self, at: Point) -> dict[str, Any]:
        return {
            sign: {"y": tree.clone(at.y), "solver": self.solver.init(at.y), "converged": None}
            for sign in (("plus", "minus") if self.central else ("plus",))
        }

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        above, plus = self._solve(losses, at, state["plus"], 1 / self.strength)
        value, F_x, _ = gradients(losses.upper, Point(at.x, above))
        G_x = gradient_x(losses.lower, at.x, above)
        if not self.central:
            gap = tree.sub(G_x, gradient_x(losses.lower, at.x, at.y))
            h = tree.axpy(self.strength, gap, F_x)
            return Estimate(h, value, {"plus": plus}, _solved(plus))
        below, minus = self._solve(losses, at, state["minus"], -1 / self.strength)
        gap = tree.sub(G_x, gradient_x(losses.lower, at.x, below))
        F_sum = tree.add(F_x, gradient_x(losses.upper, at.x, below))
        h = tree.axpy(self.strength / 2, gap, tree.scale(0.5, F_sum))
        return Estimate(h, value, {"plus": plus, "minus": minus}, _solved(plus, minus))

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """The penalty function that this estimator claims to differentiate."""

        def least(x: Params, sign: int) -> Tensor:
            y, _ = self._solve(losses, Point(x, at.y), self.init(at)["plus"], sign / self.strength)
            return losses.lower(x, y) + sign / self.strength * losses.upper(x, y)

        def gap(x: Params) -> Tensor:
            if self.central:
                return self.strength / 2 * (least(x, 1) - least(x, -1))
            return self.strength * (least(x, 1) - losses.lower(x, at.y))

        return gap

    def _solve(
        self, losses: Losses, at: Point, start: dict[str, Any], weight: float
    ) -> tuple[Params, dict[str, Any]]:
        """(argmin over y of G + weight · F, the state to go on from)."""

        def penalised(x: Params, y: Params, batch: Any) -> Tensor:
            return losses.lower(x, y) + weight * losses.upper(x, y)

        loss = Loss(penalised, None, losses.counts, "lower")
        solved = self.solver.solve(
            loss, at.x, start["y"], batches=itertools.repeat(None), state=start["solver"]
        )
        losses.counts.gradients += solved.stats.gradients  # each is one of G and one of F
        converged = solved.stats.converged
        return solved.y, {"y": solved.y, "solver": solved.state, "converged": converged}


def _solved(*ends: dict[str, Any]) -> Stats:
    """Whether the penalised problems were solved; None where the solver has no tolerance."""
    known = [end["converged"] for end in ends if end["converged"] is not None]
    return Stats(converged=all(known) if known else None)
