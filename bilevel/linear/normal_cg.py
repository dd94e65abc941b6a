"""Conjugate gradient on the normal equations of a symmetric A (CGNR). Hestenes and Stiefel (1952)."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.linear import guards
from bilevel.linear.cg import CG
from bilevel.types import Matvec, Params, Solve


@component
class NormalCG:
    """CG on A² v = A b for symmetric A, indefinite too; 2 products a step; condition number squared.

    For a lower level that is not at a strict minimum; MINRES reaches the same in fewer products unless
    rounding matters. `residual` is ‖b − A v‖ / ‖b‖ of the system asked for, which costs one more
    product; `condition` is that of A. `curvature` is the smallest pᵀA p / pᵀp of its directions, at
    no product: a negative one is a saddle, a positive one proves nothing, since A² does not tell
    an eigenvalue from its negative; minres does.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> NormalCG:
        """Converged as far as the squared condition number allows."""
        return NormalCG(iterations=guards.tight_iterations(dim, 40), tolerance=1e-10)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        met: list[float] = []

        def twice(p: Params) -> Params:
            Ap = matvec(p)
            # of A itself: pᵀA²p is never negative and says nothing
            met.append(tree.dot(p, Ap) / tree.dot(p, p))
            return matvec(Ap)

        size = guards.checked_norm(b)
        inner = CG(iterations=self.iterations, tolerance=self.tolerance**2)
        right = matvec(b) if size else b
        guards.require_finite(tree.norm(right), b)
        solve = inner.solve(twice, right, start)
        left = tree.norm(tree.sub(b, matvec(solve.solution))) / size if size else 0.0
        condition, stopped = solve.stats.condition, solve.stats.stopped or "iterations"
        if stopped != "iterations":
            # A² is flat by rounding, or the least-squares solution leaves what A does not reach
            ends = solve.stats.converged and left <= guards.resolved(b)
            stopped = "rounding" if ends else "stagnation"
        stats = guards.ended(
            stopped,
            left,
            self.tolerance,
            b,
            iterations=solve.stats.iterations,
            curvature=min(met, default=None),
            condition=condition**0.5 if condition else None,
        )
        return Solve(solve.solution, stats)
