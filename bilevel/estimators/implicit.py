"""Implicit differentiation at the lower solution. Pedregosa (2016), arXiv:1602.02355, alg. 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from bilevel import tree
from bilevel.calculus import gradients, linearize
from bilevel.composed import gauss_newton
from bilevel.linear.cg import CG
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Needs,
    Params,
    Point,
    Slot,
    component,
)


@component
class Implicit:
    """∇x F − (∂²xy G)ᵀ v with (∂²yy G + damping · I) v = ∇y F.

    Exact where ∇y G = 0, damping = 0 and the solve has converged. With ‖∇y G‖ = ε and a residual
    δ the error is O(ε + δ) (Pedregosa 2016, thm. 1); damping adds O(damping / smallest
    eigenvalue). Costs 2 gradients, the solver's HVPs and 1 cross product; the adjoint v
    warm-starts the next call unless `warm_start` is off.

    `curvature: gauss_newton` puts the Gauss-Newton matrix in the place of ∂²yy G, for 1 gradient
    more: positive semidefinite where ∂²yy G need not be, and biased except where the outputs of a
    `bilevel.composed.Composed` lower loss are linear in y.

    Raises:
        ProblemError: `curvature` is gauss_newton and the lower loss is no `Composed`.
    """

    solver: Annotated[LinearSolver, Slot("linear")] = Field(default_factory=CG)
    damping: NonNegativeFloat = 0.0
    warm_start: bool = True
    curvature: Literal["hessian", "gauss_newton"] = "hessian"

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def claim(self) -> Literal["solution"] | None:
        approximate = (
            self.damping
            or self.curvature != "hessian"
            or getattr(self.solver, "approximate", False)
        )
        return None if approximate else "solution"

    def tight(self, dim: int) -> Implicit:
        """The same method with the solve converged, where its claim can be tested."""
        tighten = getattr(self.solver, "tight", None)
        solver = tighten(dim) if tighten else self.solver
        return replace(self, solver=solver)

    def init(self, at: Point) -> Params:
        return tree.zeros_like(at.y)

    def estimate(self, losses: Losses, at: Point, state: Params) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        exact = self.curvature == "hessian"
        product = lower.hvp_yy if exact else gauss_newton(losses.lower, at)

        def matvec(u: Params) -> Params:
            return tree.axpy(self.damping, u, product(u))

        start = state if self.warm_start else tree.zeros_like(F_y)
        solve = self.solver.solve(matvec, lower.restrict(F_y), start)
        hypergradient = tree.sub(F_x, lower.vjp_xy(solve.solution))
        return Estimate(hypergradient, value, solve.solution, solve.stats)
