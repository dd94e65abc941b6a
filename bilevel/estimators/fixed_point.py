"""Implicit differentiation of a fixed point. Grazzi, Franceschi, Pontil and Salzo (2020), arXiv:2006.16218, sec. 3.

With Neumann's series at scale 1 this is their fixed-point method, v ← (∂yT)ᵀ v + ∇y F.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from bilevel import tree
from bilevel.calculus.fixed_point_maps import Map, linearize_map
from bilevel.calculus.products import gradients
from bilevel.components import Slot, component
from bilevel.errors import ConvergenceError
from bilevel.linear.gmres import GMRES
from bilevel.linear.guards import flagged, solved
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Needs,
    Params,
    Point,
    Solve,
    Stats,
    is_approximate,
    tightened,
)


@component
class FixedPoint:
    """∇x F + (∂x T)ᵀ v with (I − ∂y T)ᵀ v = ∇y F, where y = T(x, y) is the lower solution.

    T is the problem's `lower_map`; else a gradient step of length `lr` on G, followed by its
    `prox_lower` or `project_lower`: so a lower level that is constrained or not smooth is
    differentiated rightly where its active set is stable. Exact where y = T(x, y) and the solve
    has converged, whatever `lr`. I − ∂y T has no symmetry, which is why `gmres` is the default;
    `neumann` at scale 1 iterates the fixed point of the adjoint, at the rate of the spectral
    radius of ∂y T, and needs `lr` < 2 / largest eigenvalue.

    Costs 2 gradients, the solver's products and one more for the true residual, counted as HVPs,
    and 1 cross product. Kinks and constraints weakly active (within `margin`, or within the
    distance that T still moves y) are counted in `degenerate` and flagged `converged=False`.

    Raises:
        ConvergenceError: the series diverges, so T is not a contraction here.
        ProblemError: T returns other names or shapes than those of y.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"project_lower", "prox_lower"})
    lr: PositiveFloat = 0.1
    solver: Annotated[LinearSolver, Slot("linear")] = Field(default_factory=GMRES)
    warm_start: bool = True
    margin: PositiveFloat = 1e-6

    @property
    def needs(self) -> Needs:
        return Needs(supports=self.supports)

    @property
    def claim(self) -> Literal["solution"] | None:
        return None if is_approximate(self.solver) else "solution"

    def tight(self, dim: int) -> FixedPoint:
        """The same method with the solve converged, where its claim can be tested."""
        return replace(self, solver=tightened(self.solver, dim))

    def init(self, at: Point) -> Params:
        return tree.zeros_like(at.y)

    def estimate(self, losses: Losses, at: Point, state: Params) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        step = linearize_map(losses.lower, at, self.lr)
        start = state if self.warm_start else tree.zeros_like(F_y)
        solve = self._solve(step, step.restrict(F_y), start)
        kinks = step.kinks(self.margin)
        curvature = min(step.curvature, default=None)
        error = -tree.dot(solve.solution, step.shift)
        stats = replace(solve.stats, degenerate=kinks, curvature=curvature, value_error=error)
        stats = flagged(stats, "degenerate") if kinks else stats
        return Estimate(tree.add(F_x, step.vjp_x(solve.solution)), value, solve.solution, stats)

    def _solve(self, step: Map, b: Params, start: Params) -> Solve:
        def matvec(v: Params) -> Params:
            return tree.sub(v, step.vjp_y(v))

        try:
            solve = solved(self.solver, matvec, b, start)
        except ConvergenceError as error:
            raise ConvergenceError(
                f"{error}. Here the Hessian's place is taken by I − ∂T/∂y: T is not a contraction at "
                f"this y; lower `lr` = {self.lr:g} (unused by a lower_map), or use solver: gmres"
            ) from error
        return Solve(solve.solution, self._verified(solve.stats, matvec, b, solve.solution))

    def _verified(self, stats: Stats, matvec, b: Params, v: Params) -> Stats:
        """With the true residual: solvers made for symmetric systems misjudge theirs."""
        size = tree.norm(b)
        if stats.residual is None or not size:
            return stats
        left = tree.norm(tree.sub(b, matvec(v))) / size
        off = left > 10 * max(stats.residual, getattr(self.solver, "tolerance", 0.0))
        stats = replace(stats, residual=left)
        return flagged(stats, "unverified") if off else stats
