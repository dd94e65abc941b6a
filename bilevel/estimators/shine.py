"""SHINE: the adjoint from what the lower solver already knows.

Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau (2022), arXiv:2106.00553, algorithm 1 with (L-)BFGS,
and its refinement (sec. 3). Its outer-problem awareness and fallback were measured and left out:
as many products do more as CG iterations preconditioned by the pairs (docs/estimators/reuse.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.calculus.products import gradients, linearize
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.linear.guards import damped
from bilevel.linear.quasi_newton import NO_PAIRS, bfgs, block, newest
from bilevel.types import (
    Estimate,
    LinearSolver,
    Losses,
    Needs,
    Point,
    Solve,
    Stats,
    is_approximate,
    tightened,
)


@component
class Shine:
    """∇x F − (∂²xy G)ᵀ v with v = B⁻¹ ∇y F, B made of the lower solver's last pairs.

    No Hessian product. `update: bfgs` is the L-BFGS matrix, as in the paper: it maps the last step
    as ∂²yy G + damping · I does, and the others only where they are conjugate. `block` maps all of
    them so at once, for another dim(y) · memory numbers while it works: exact for quadratic G once
    the steps span the space of y. Elsewhere the error is unknown, and no residual is reported.
    Pairs of earlier lower solves, at other x, fill up `memory` where the present one has fewer;
    with no pair at all B = I. Costs 2 gradients and 1 cross product, and keeps 2 · memory vectors
    of the size of y.

    `refine` is a linear solver for (∂²yy G + damping · I) v = ∇y F that starts at B⁻¹ ∇y F: exact
    once it has converged, for as many HVPs as it takes. `Stats.iterations` counts the pairs, or
    its iterations.

    Raises:
        ProblemError: the lower solver gives no pairs.
    """

    memory: PositiveInt = 20
    update: Literal["bfgs", "block"] = "bfgs"
    refine: Annotated[LinearSolver, Slot("linear")] | None = None
    damping: NonNegativeFloat = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True)

    @property
    def claim(self) -> Literal["solution"] | None:
        approximate = self.refine is None or is_approximate(self.refine)
        return None if approximate or self.damping else "solution"

    def tight(self, dim: int) -> Shine:
        """The same method with the refinement converged, where its claim can be tested."""
        return replace(self, refine=tightened(self.refine, dim))

    def init(self, at: Point) -> dict[str, Any]:
        return NO_PAIRS

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        if at.pairs is None:
            raise ProblemError(
                "shine reuses the pairs of a quasi-Newton lower solver and there are none; use "
                "lower: lbfgs in a recipe; of bilevel.hypergradient pass as y what "
                "bilevel.solve_lower(..., solver=LBFGS()) returns"
            )
        pairs, kept = newest(state, at.pairs, self.memory)
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        b = lower.restrict(F_y)
        size = tree.norm(b) if self.damping else 0.0
        invert = bfgs if self.update == "bfgs" else block
        v = invert([(s, tree.axpy(self.damping, s, c)) for s, c in pairs])(b)
        solve = Solve(v, Stats(iterations=len(pairs)))
        if self.refine:
            solve = self.refine.solve(lambda u: tree.axpy(self.damping, u, lower.hvp_yy(u)), b, v)
        v, stats = solve.solution, solve.stats
        if self.refine:
            stats = replace(stats, value_error=tree.dot(v, lower.gradient))
        if self.damping:
            stats = damped(stats, self.damping, v, size)
        return Estimate(tree.sub(F_x, lower.vjp_xy(v)), value, kept, stats)
