"""Implicit differentiation at the lower solution. Pedregosa (2016), arXiv:1602.02355, alg. 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from bilevel import tree
from bilevel.adjoint.bound import KnownBound
from bilevel.adjoint.solve import AdjointSolver
from bilevel.adjoint.starts import Start
from bilevel.calculus.gauss_newton import gauss_newton
from bilevel.calculus.products import gradients, linearize
from bilevel.components import Slot, component
from bilevel.linear.cg import CG
from bilevel.linear.guards import damped
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Needs,
    Params,
    Point,
    Preconditioner,
    System,
    changed,
    is_approximate,
    tightened,
)


@component
class Implicit:
    """∇x F − (∂²xy G)ᵀ v with (∂²yy G + damping · I) v = ∇y F.

    Exact where ∇y G = 0, damping = 0 and the solve has converged. With ‖∇y G‖ = ε and a residual
    δ the error is O(ε + δ) (Pedregosa 2016, thm. 1); damping adds O(damping / smallest
    eigenvalue). Costs 2 gradients, the solver's HVPs and 1 cross product, and what start,
    preconditioner and `target_error` add.

    `strong_convexity`, `cross_norm` and `sensitivity` make `Stats.error_bound` a bound
    (`bilevel.adjoint.bound`); without them it is an estimate of the error of the solve alone, from
    the Ritz values, where `target_error` is given.

    Raises:
        RecipeError: `target_error` or `preconditioner` with a solver that does not accept it;
            constants with curvature other than hessian.
        ProblemError: `curvature` is gauss_newton and the lower loss is no `Composed`.
    """

    solver: Annotated[LinearSolver, Slot("linear")] = Field(default_factory=CG)
    damping: NonNegativeFloat = 0.0
    target_error: PositiveFloat | None = None
    """Relative, of the hypergradient: solve just as far, by the fewest products (start `galerkin`,
    preconditioner `recycled`, up to 10 dim(y) + 100 iterations, 5,000 at most, where nothing else is
    set). `converged` says whether the estimate of the error holds it: no proof."""
    start: Start | None = None
    """From zero, the last adjoint (the default), linear extrapolation of the last two, or the best
    combination of the last three (1 product each)."""
    preconditioner: Annotated[Preconditioner, Slot("preconditioners")] | None = None
    """For solvers that accept one (`LinearSolver.accepts`): cg."""
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    """gauss_newton: its matrix in the place of ∂²yy G, 1 gradient more; positive semidefinite, and
    biased except where the outputs of a `bilevel.calculus.gauss_newton.Composed` are linear in y."""
    strong_convexity: PositiveFloat | None = None
    """A lower bound of the eigenvalues of ∂²yy G, damping left out."""
    cross_norm: PositiveFloat | None = None
    """An upper bound of ‖∂²xy G‖."""
    sensitivity: PositiveFloat | None = None
    """A Lipschitz constant in y of the estimate."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        self._adjoint.require_accepted()
        if (self.strong_convexity is None) != (self.cross_norm is None):
            raise ValueError("strong_convexity and cross_norm are of use together only")
        if self.strong_convexity is not None and self.curvature != "hessian":
            why = "strong_convexity bounds nothing with curvature: gauss_newton, another system"
            raise ValueError(f"{why}; leave it and cross_norm out, or use curvature: hessian")
        return self

    @property
    def needs(self) -> Needs:
        return Needs(pairs=getattr(self.preconditioner, "needs_pairs", False))

    @property
    def claim(self) -> Literal["solution"] | None:
        exact = self.curvature == "hessian" and not is_approximate(self.solver)
        return "solution" if exact and not self.damping else None

    def tight(self, dim: int) -> Implicit:
        """The same method with the solve converged, where its claim can be tested."""
        return replace(self, solver=tightened(self.solver, dim), target_error=None)

    def init(self, at: Point) -> dict[str, Any]:
        return self._adjoint.init(at)

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        is_exact = self.curvature == "hessian"
        product = lower.hvp_yy if is_exact else gauss_newton(losses.lower, at)

        def matvec(u: Params) -> Params:
            return tree.axpy(self.damping, u, product(u))

        def h_of(v: Params) -> Params:
            return tree.sub(F_x, lower.vjp_xy(v))

        b, bound = lower.restrict(F_y), self._bound
        size = tree.norm(b) if bound or self.damping else 0.0  # before the solver writes into b
        system = System(
            matvec if self.damping else product, b, losses, at, self.damping, state["spent"]
        )
        h, solve, state = self._adjoint.solve(system, h_of, state)
        stats = bound.stats(solve, size, lower.gradient) if bound else solve.stats
        if stats.residual is not None:
            stats = changed(stats, value_error=tree.dot(solve.solution, lower.gradient))
        if self.damping:
            stats = damped(stats, self.damping, solve.solution, size)
        return Estimate(h, value, state, stats)

    @property
    def _adjoint(self) -> AdjointSolver:
        asked = self.start, self.preconditioner, self.target_error
        return AdjointSolver.chosen(self.solver, *asked)

    @property
    def _bound(self) -> KnownBound | None:
        if self.strong_convexity is None or self.cross_norm is None:
            return None
        return KnownBound(self.damping, self.strong_convexity, self.cross_norm, self.sensitivity)
