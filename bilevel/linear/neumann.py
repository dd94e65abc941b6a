"""Truncated Neumann series for A⁻¹ b. Lorraine, Vicol and Duvenaud (2020), arXiv:1911.02590, alg. 3."""

from __future__ import annotations

import math
from dataclasses import replace

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ConvergenceError
from bilevel.linear import guards
from bilevel.scalars.functions import larger, smaller
from bilevel.types import Matvec, Params, Solve, Stopped


@component
class Neumann:
    """v_K = scale · Σ_{k < K} (I − scale · A)ᵏ b; error ratio ‖I − scale · A‖ a term; 1 product a term.

    Converges if and only if every eigenvalue of A lies in (0, 2 / scale). Equals K Richardson
    steps v ← v + scale (b − A v) from `start`, which is how it is computed: so a warm start
    continues the series, and the last term is the residual. A start other than zero costs one
    more product.

    Raises:
        ConvergenceError: the terms grow three times in a row, or each time where there are fewer;
            a product is not finite.
    """

    iterations: PositiveInt = 20
    scale: PositiveFloat = 0.1
    tolerance: NonNegativeFloat = 0.0

    def tight(self, dim: int) -> Neumann:
        """The series at the same scale until its terms vanish, or 20,000 of them."""
        return replace(self, iterations=20_000, tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, size = guards.begin(matvec, b, start)
        reach, norm = tree.norm(v), tree.norm(r)
        lowest, largest, growth, steps = math.inf, 0.0, 0, 0
        target = max(self.tolerance, guards.underflow_floor(b)) * size
        while steps < self.iterations and norm > target:
            tree.axpy_(v, self.scale, r)
            Ar = matvec(r)
            steps, previous = steps + 1, norm
            bend = guards.require_finite(tree.dot(r, Ar), r) / norm**2
            lowest, largest = smaller(lowest, bend), larger(largest, abs(bend))
            norm = tree.norm(tree.axpy_(r, -self.scale, Ar))
            del Ar  # or the next product is computed beside it: one vector more at the peak
            growth = growth + 1 if norm > previous else 0
            if growth == 3 or growth == self.iterations:
                self._refuse(steps, norm / previous)
        stopped: Stopped = "tolerance" if norm <= target else "iterations"
        stats = guards.ended(
            stopped,
            guards.attainable_residual(norm, v, size, largest, reach),
            self.tolerance,
            v,
            guards.relative_floor(v, size, largest),
            iterations=steps,
            curvature=None if lowest == math.inf else lowest,
        )
        if stats.stopped == "iterations" and self.tolerance == 0:
            stats = replace(stats, converged=None)  # a number of terms was asked for, no residual
        return Solve(v, stats)

    def _refuse(self, steps: int, ratio: float) -> None:
        raise ConvergenceError(
            f"the Neumann series diverges: term {steps} is {ratio:.3g} times the one before. "
            f"scale = {self.scale:g} must be below 2 / (largest eigenvalue of the lower Hessian), "
            "and the Hessian positive definite: lower `scale` to "
            f"{0.9 * self.scale * 2 / (1 + ratio):.2g} or less, or add `damping`"
        )
