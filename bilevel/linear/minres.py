"""MINRES for symmetric, possibly indefinite A. Paige and Saunders (1975), SIAM J. Numer. Anal. 12(4)."""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.linear import guards
from bilevel.linear.lanczos import Tridiagonal
from bilevel.scalars.functions import call, larger
from bilevel.types import Matvec, Params, Solve, Stopped


@component
class MINRES:
    """The v of smallest ‖b − A v‖ in the Krylov space; symmetric A, indefinite too; 1 product a step.

    Exact in dim(b) steps; the residual never grows, up to rounding. On a singular A it stops at
    the least-squares solution, ‖A r‖ ≤ eps^⅔ ‖A‖ ‖r‖, and is flagged `converged=False` unless b
    lies in the range. At an indefinite lower Hessian y is a saddle and no minimum: `curvature`
    reports it, the solution is the stationary point's derivative all the same. Curvature and
    condition come from the Ritz values. A start other than zero costs one more product, and so
    does the true residual at the end: the one of the recursion may be a million times smaller
    where A is ill-conditioned or not symmetric.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> MINRES:
        """Converged as far as float64 allows."""
        return MINRES(iterations=guards.tight_iterations(dim), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, size = guards.begin(matvec, b, start)
        beta = start_residual = tree.norm(r)
        reach, eps = tree.norm(v), tree.eps(b)
        stopped: Stopped = "iterations"
        target = max(self.tolerance, guards.underflow_floor(b)) * size
        singular = guards.accumulation_eps(b) ** (2 / 3)
        eta, steps, largest, lanczos = beta, 0, 0.0, Tridiagonal()
        q_old, w_old, w = tree.zeros_like(b), tree.zeros_like(b), tree.zeros_like(b)
        q = tree.scale_(r, 1 / beta) if beta else r
        cosines, sines = (1.0, 1.0), (0.0, 0.0)  # of the last two Givens rotations
        while steps < self.iterations and abs(eta) > target:
            if abs(eta) <= guards.RESOLVED * size:
                length = larger(reach, tree.norm(v))
                if guards.is_below_rounding(abs(eta), eps, size, largest, length):
                    stopped = "rounding"
                    break
            Aq = tree.clone(matvec(q))
            steps += 1
            alpha = guards.require_finite(tree.dot(q, Aq), q)
            tree.axpy_(tree.axpy_(Aq, -alpha, q), -beta if steps > 1 else 0.0, q_old)
            after = tree.norm(Aq)
            largest = larger(largest, call(math.hypot, alpha, after))
            lanczos.diagonal.append(alpha)
            lanczos.off.append(after)
            delta = cosines[1] * alpha - cosines[0] * sines[1] * beta
            rho = call(math.hypot, delta, after)
            # ‖A r‖ / ‖r‖ of the residual before this step
            if call(math.hypot, delta, cosines[1] * after) <= singular * largest:
                stopped = "stagnation"
                break
            upper = sines[1] * alpha + cosines[0] * cosines[1] * beta
            step = tree.clone(q)
            tree.axpy_(tree.axpy_(step, -upper, w), -sines[0] * beta, w_old)
            w_old, w = w, tree.scale_(step, 1 / rho)
            cosines, sines = (cosines[1], delta / rho), (sines[1], after / rho)
            tree.axpy_(v, cosines[1] * eta, w)
            eta, beta = -sines[1] * eta, after
            if after:
                q_old, q = q, tree.scale_(Aq, 1 / after)
        left = tree.norm(tree.sub(b, matvec(v))) if steps else start_residual
        stats = guards.ended(
            stopped if abs(eta) > target else "tolerance",
            left / (size or 1.0),
            self.tolerance,
            v,
            guards.relative_floor(v, size, largest),
            iterations=steps,
            curvature=lanczos.smallest,
            condition=lanczos.condition,
        )
        return Solve(v, stats)
