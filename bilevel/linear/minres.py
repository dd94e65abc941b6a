"""MINRES for symmetric, possibly indefinite A. Paige and Saunders (1975), SIAM J. Numer. Anal. 12(4)."""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.linear.cg import Tridiagonal, attained, finite, residual
from bilevel.types import Matvec, Params, Solve, Stats, component


@component
class MINRES:
    """The v of smallest ‖b − A v‖ in the Krylov space; symmetric A, indefinite too; 1 product a step.

    Exact in dim(b) steps; the residual never grows. On a singular A it tends to a least-squares
    solution and is flagged `converged=False` unless b lies in the range. At an indefinite lower
    Hessian y is a saddle and no minimum: `curvature` reports it, the solution is the stationary
    point's derivative all the same. Curvature and condition come from the Ritz values. A start other than zero costs one more product.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> MINRES:
        """Converged as far as float64 allows."""
        return MINRES(iterations=min(20 * dim + 100, 20_000), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, _ = residual(matvec, b, start)
        size, beta = tree.norm(b), tree.norm(r)
        eta, steps, largest, lanczos = beta, 0, 0.0, Tridiagonal()
        q_old, w_old, w = tree.zeros_like(b), tree.zeros_like(b), tree.zeros_like(b)
        q = tree.scale_(r, 1 / beta) if beta else r
        cosines, sines = (1.0, 1.0), (0.0, 0.0)  # of the last two Givens rotations
        while steps < self.iterations and abs(eta) > self.tolerance * size:
            Aq = tree.clone(matvec(q))
            steps += 1
            alpha = finite(tree.dot(q, Aq))
            largest = max(largest, abs(alpha))
            tree.axpy_(tree.axpy_(Aq, -alpha, q), -beta if steps > 1 else 0.0, q_old)
            after = tree.norm(Aq)
            lanczos.diagonal.append(alpha)
            lanczos.off.append(after)
            delta = cosines[1] * alpha - cosines[0] * sines[1] * beta
            rho = math.hypot(delta, after)
            if rho <= 1e-15 * largest:
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
        relative = attained(abs(eta), v, size, largest)
        return Solve(
            v,
            Stats(
                iterations=steps,
                residual=relative,
                curvature=float(lanczos.ritz()[0]) if steps else None,
                condition=lanczos.condition,
                converged=relative <= self.tolerance,
            ),
        )
