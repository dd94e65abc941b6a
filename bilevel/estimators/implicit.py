"""Implicit differentiation at the lower solution. Pedregosa (2016), arXiv:1602.02355, alg. 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from bilevel import tree
from bilevel.adjoint.starts import DEPTH, Start, begin, known
from bilevel.adjoint.stopping import HoldsError, rounding
from bilevel.calculus.gauss_newton import gauss_newton
from bilevel.calculus.products import Linearization, gradients, linearize
from bilevel.components import Slot, component
from bilevel.linear.cg import CG, Sample
from bilevel.linear.guards import length
from bilevel.preconditioners.recycled import Recycled
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Matvec,
    Needs,
    Params,
    Point,
    Preconditioner,
    Solve,
    Stats,
    System,
)

AT_END = 0.1
"""What part of the asked error condition × residual may be where a solve ended by itself: h may be
shorter than (∂²xy G)ᵀ v, and the condition number is seen from below."""


@component
class Implicit:
    """∇x F − (∂²xy G)ᵀ v with (∂²yy G + damping · I) v = ∇y F.

    Exact where ∇y G = 0, damping = 0 and the solve has converged. With ‖∇y G‖ = ε and a residual
    δ the error is O(ε + δ) (Pedregosa 2016, thm. 1); damping adds O(damping / smallest
    eigenvalue). Costs 2 gradients, the solver's HVPs and 1 cross product, and what start,
    preconditioner and `error` add.

    `error` asks for that relative error of the hypergradient and solves just as far (with cg); it
    brings the fewest products along a run: start `galerkin` and the preconditioner `recycled`,
    unless others are given, and with the default solver up to 10 dim(y) + 100 iterations
    (5,000 at most). `converged` says whether it is held by the estimate in `Stats.error_bound`: no
    proof, since directions that no solve met are not in it.
    `start`: from zero, the last adjoint, linear extrapolation of the last two, or the best
    combination of the last three (1 product each).
    `preconditioner`: for cg.
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
        ValidationError: `error` or `preconditioner` with a solver other than cg; constants with
            curvature other than hessian.
        ProblemError: `curvature` is gauss_newton and the lower loss is no `Composed`.
    """

    solver: Annotated[LinearSolver, Slot("linear")] = Field(default_factory=CG)
    damping: NonNegativeFloat = 0.0
    error: PositiveFloat | None = None
    start: Start | None = None
    preconditioner: Annotated[Preconditioner, Slot("preconditioners")] | None = None
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    strong_convexity: PositiveFloat | None = None
    cross_norm: PositiveFloat | None = None
    sensitivity: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_cg_can(self) -> Self:
        if (self.error or self.preconditioner) and not isinstance(self.solver, CG):
            raise ValueError("error and preconditioner need solver: cg")
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
        return Needs(pairs=getattr(self._preconditioner, "needs_pairs", False))

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
        return replace(self, solver=tighten(dim) if tighten else self.solver, error=None)

    def init(self, at: Point) -> dict[str, Any]:
        chosen = self._preconditioner
        kept = chosen.init(at) if chosen else {}
        return {"past": [], "spent": None, "preconditioner": kept, "stopping": {}}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        b = lower.restrict(F_y)
        size = length(b)

        exact = self.curvature == "hessian"
        product = lower.hvp_yy if exact else gauss_newton(losses.lower, at)

        def matvec(u: Params) -> Params:
            return tree.axpy(self.damping, u, product(u))

        system = System(matvec, b, losses, at, self.damping, state["spent"])
        chosen = self._preconditioner
        inverse, kept = chosen.prepare(system, state["preconditioner"]) if chosen else (None, {})
        start, r = begin(self._start, matvec, b, state["past"])
        rule = HoldsError(self.error, F_x, lower.vjp_xy, state["stopping"]) if self.error else None
        sample = Sample(chosen.room(b)) if isinstance(chosen, Recycled) else None
        solve = self._solve(matvec, b, size, start, r, inverse, rule, sample)
        if sample and isinstance(chosen, Recycled):
            kept = chosen.learn(kept, sample.pairs)
        h = rule.h if rule else None
        if h is None:
            h = tree.sub(F_x, lower.vjp_xy(solve.solution))
        depth = DEPTH[self._start]
        stats = self._bounded(solve, rule, size, lower, tree.norm(tree.sub(h, F_x)))
        if rule and not _bends(solve, rule):
            return Estimate(h, value, state, stats)  # what such a solve met helps no other
        state = {
            "past": [*state["past"], solve.solution][-depth:] if depth else [],
            "spent": solve.stats.iterations,
            "preconditioner": kept,
            "stopping": rule.memory if rule else {},
        }
        return Estimate(h, value, state, stats)

    @property
    def _start(self) -> Start:
        return self.start or ("galerkin" if self.error else "warm")

    @property
    def _preconditioner(self) -> Preconditioner | None:
        return self.preconditioner or (Recycled() if self.error else None)

    def _solve(
        self,
        matvec: Matvec,
        b: Params,
        size: float,
        start: Params,
        r: Params | None,
        inverse: Matvec | None,
        rule: HoldsError | None,
        keep: Sample | None,
    ) -> Solve:
        if not isinstance(self.solver, CG):
            if r is not None:
                matvec = known(matvec, start, tree.sub(b, r))
            return self.solver.solve(matvec, b, start)
        if r is None:
            # b becomes the residual: nobody looks at it again, and it is one vector less
            if tree.norm(start) == 0:
                r = b
            else:
                start, r = tree.clone(start), tree.axpy_(b, -1.0, matvec(start))
        if rule is None:
            return self.solver.run(matvec, start, r, size, precondition=inverse, keep=keep)
        solver = self.solver
        if solver == CG():
            solver = CG(iterations=min(10 * tree.size(b) + 100, 5000))
        solver = replace(solver, tolerance=rounding(b))
        solve = solver.run(matvec, start, r, size, precondition=inverse, enough=rule, keep=keep)
        # one that ended by itself has the error of v at most, which is condition × residual
        left = (solve.stats.condition or 1.0) * (solve.stats.residual or 0.0)
        done = rule.held or left <= AT_END * (self.error or 0.0)
        done = done and _bends(solve, rule)
        return replace(solve, stats=replace(solve.stats, converged=done))

    def _bounded(
        self,
        solve: Solve,
        rule: HoldsError | None,
        size: float,
        lower: Linearization,
        implicit: float,
    ) -> Stats:
        """The statistics with a bound of the error; `implicit` is the length of (∂²xy G)ᵀ v."""
        stats, left = solve.stats, (solve.stats.residual or 0.0) * size
        if stats.residual is None:
            return stats
        if self.strong_convexity is not None and self.cross_norm is not None:
            # A v = b − r − damping · v, and what is bounded is the error against A v = b
            left += self.damping * tree.norm(solve.solution)
            bound = self.cross_norm * left / self.strong_convexity
            if self.sensitivity is not None:
                bound += self.sensitivity * tree.norm(lower.gradient) / self.strong_convexity
            off = "" if self.sensitivity is not None else ", y taken as solved"
            return replace(stats, error_bound=bound, error_bound_from=f"known constants{off}")
        if rule and math.isfinite(rule.estimate):
            return replace(
                stats, error_bound=rule.estimate, error_bound_from="Ritz values, y taken as solved"
            )
        return stats


def _bends(solve: Solve, rule: HoldsError) -> bool:
    """Whether A curved up in all that was met, by more than the rounding of its steepest curvature."""
    curvature, b = solve.stats.curvature, solve.solution
    return curvature is None or curvature > tree.eps(b) * rule.steepest
