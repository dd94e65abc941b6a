"""Conjugate gradient on the normal equations of a symmetric A (CGNR). Hestenes and Stiefel (1952)."""

from __future__ import annotations

from dataclasses import replace

from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.linear.cg import CG
from bilevel.linear.guards import finite, length
from bilevel.types import Matvec, Params, Solve


@component
class NormalCG:
    """CG on A² v = A b for symmetric A, indefinite too; 2 products a step; condition number squared.

    For a lower level that is no strict minimum; MINRES reaches the same in fewer products unless
    rounding matters. `residual` is ‖b − A v‖ / ‖b‖ of the system asked for, which costs one more
    product; `condition` is that of A.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> NormalCG:
        """Converged as far as the squared condition number allows."""
        return NormalCG(iterations=min(40 * dim + 100, 20_000), tolerance=1e-10)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        def twice(v: Params) -> Params:
            return matvec(matvec(v))

        size = length(b)
        inner = CG(iterations=self.iterations, tolerance=self.tolerance**2)
        right = matvec(b) if size else b
        finite(tree.norm(right))
        solve = inner.solve(twice, right, start)
        left = tree.norm(tree.sub(b, matvec(solve.solution))) / size if size else 0.0
        condition = solve.stats.condition
        stats = replace(
            solve.stats,
            residual=left,
            curvature=None,  # pᵀA²p is never negative: it says nothing about A
            condition=condition**0.5 if condition else None,
            converged=left <= self.tolerance,
        )
        return Solve(solve.solution, stats)
