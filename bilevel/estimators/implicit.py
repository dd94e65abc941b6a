"""Implicit differentiation at the lower solution. Pedregosa (2016), arXiv:1602.02355, alg. 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from bilevel import tree
from bilevel.adjoint.bound import with_known_bound
from bilevel.adjoint.solve import AdjointSolver
from bilevel.adjoint.starts import Start
from bilevel.calculus.gauss_newton import gauss_newton
from bilevel.calculus.products import gradients, linearize
from bilevel.components import Slot, component
from bilevel.linear.cg import CG
from bilevel.preconditioners.recycled import Recycled
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Needs,
    Params,
    Point,
    Preconditioner,
    System,
    tightened,
)


@component
class Implicit:
    """∇x F − (∂²xy G)ᵀ v with (∂²yy G + damping · I) v = ∇y F.

    Exact where ∇y G = 0, damping = 0 and the solve has converged. With ‖∇y G‖ = ε and a residual
    δ the error is O(ε + δ) (Pedregosa 2016, thm. 1); damping adds O(damping / smallest
    eigenvalue). Costs 2 gradients, the solver's HVPs and 1 cross product, and what start,
    preconditioner and `target_error` add.

    `target_error` asks for that relative error of the hypergradient and solves just as far; it
    brings the fewest products along a run: start `galerkin` and the preconditioner `recycled`,
    unless others are given, and up to 10 dim(y) + 100 iterations (5,000 at most) unless
    `solver` sets them. `converged` says whether it is held by the estimate in `Stats.error_bound`: no
    proof, since directions that no solve met are not in it.
    `start`: from zero, the last adjoint, linear extrapolation of the last two, or the best
    combination of the last three (1 product each).
    `preconditioner` and `target_error` are for solvers that accept them (`LinearSolver.accepts`): cg.
    `curvature: gauss_newton` puts the Gauss-Newton matrix in the place of ∂²yy G, for 1 gradient
    more: positive semidefinite where ∂²yy G need not be, and biased except where the outputs of a
    `bilevel.calculus.gauss_newton.Composed` lower loss are linear in y.
    `strong_convexity`, `cross_norm`: a lower bound of the eigenvalues of ∂²yy G, damping left out,
    and an upper bound of ‖∂²xy G‖; `sensitivity`: a Lipschitz constant in y of the estimate. With
    them `Stats.error_bound` is cross_norm (‖r‖ + damping ‖v‖) / strong_convexity + sensitivity
    ‖∇y G‖ / strong_convexity, the second term where it is given (Ghadimi and Wang 2018,
    arXiv:1802.02246, lemma 2.2); without, an estimate of the error of the solve alone, from the
    Ritz values, in which damping and an unsolved y are left out.

    Raises:
        ValidationError: `target_error` or `preconditioner` with a solver that does not accept it;
            constants with curvature other than hessian.
        ProblemError: `curvature` is gauss_newton and the lower loss is no `Composed`.
    """

    solver: Annotated[LinearSolver, Slot("linear")] = Field(default_factory=CG)
    damping: NonNegativeFloat = 0.0
    target_error: PositiveFloat | None = None
    start: Start | None = None
    preconditioner: Annotated[Preconditioner, Slot("preconditioners")] | None = None
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    strong_convexity: PositiveFloat | None = None
    cross_norm: PositiveFloat | None = None
    sensitivity: PositiveFloat | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if missing := self._adjoint.missing:
            raise ValueError(
                f"target_error and preconditioner need a solver that accepts {', '.join(missing)}, "
                f"and {type(self.solver).__name__} does not; use solver: cg"
            )
        if (self.strong_convexity is None) != (self.cross_norm is None):
            raise ValueError("strong_convexity and cross_norm are of use together only")
        if self.strong_convexity is not None and self.curvature != "hessian":
            raise ValueError(
                "strong_convexity bounds nothing with curvature: gauss_newton, which solves another "
                "system; leave it and cross_norm out, or use curvature: hessian"
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs(pairs=getattr(self.preconditioner, "needs_pairs", False))

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
        return replace(self, solver=tightened(self.solver, dim), target_error=None)

    def init(self, at: Point) -> dict[str, Any]:
        return self._adjoint.init(at)

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        exact = self.curvature == "hessian"
        product = lower.hvp_yy if exact else gauss_newton(losses.lower, at)

        def matvec(u: Params) -> Params:
            return tree.axpy(self.damping, u, product(u))

        def h_of(v: Params) -> Params:
            return tree.sub(F_x, lower.vjp_xy(v))

        b = lower.restrict(F_y)
        size = tree.norm(b) if self.strong_convexity is not None else 0.0
        system = System(matvec, b, losses, at, self.damping, state["spent"])
        h, solve, state = self._adjoint.solve(system, h_of, state)
        stats = solve.stats
        if self.strong_convexity is not None and self.cross_norm is not None:
            stats = with_known_bound(
                solve,
                size,
                lower.gradient,
                damping=self.damping,
                strong_convexity=self.strong_convexity,
                cross_norm=self.cross_norm,
                sensitivity=self.sensitivity,
            )
        return Estimate(h, value, state, stats)

    @property
    def _adjoint(self) -> AdjointSolver:
        asked = self.target_error is not None
        return AdjointSolver(
            self.solver,
            self.start or ("galerkin" if asked else "warm"),
            self.preconditioner or (Recycled() if asked else None),
            self.target_error,
        )
