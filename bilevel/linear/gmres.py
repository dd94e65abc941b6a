"""Restarted GMRES for any square A. Saad and Schultz (1986), SIAM J. Sci. Stat. Comput. 7(3)."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.linear import guards
from bilevel.types import Matvec, Params, Solve, Stopped


@component
class GMRES:
    """The v of smallest ‖b − A v‖ in the Krylov space, A of no symmetry; 1 product a step.

    Exact in dim(b) steps where `restart` ≥ dim(b); with fewer it may stall on indefinite A and is
    then flagged. Keeps `restart` + 1 vectors of the size of b; orthogonalises twice. Each restart
    costs one more product, as does a start other than zero. `curvature` is the smallest eigenvalue
    of the symmetric part of the Hessenberg matrix, at no product: for symmetric A a Ritz value, so
    that it is negative only if A has a negative eigenvalue.
    """

    iterations: PositiveInt = 20
    restart: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> GMRES:
        """Converged, keeping at most 300 vectors."""
        return GMRES(iterations=20 * dim + 100, restart=min(dim, 300), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, size = guards.begin(matvec, b, start)
        reach, norm, steps, largest, lowest = tree.norm(v), tree.norm(r), 0, 0.0, math.inf
        target = max(self.tolerance, guards.underflow_floor(b)) * size
        stopped: Stopped = "iterations"
        while steps < self.iterations and norm > target:
            budget = min(self.restart, self.iterations - steps)
            basis, H, norm_after = self._cycle(matvec, r, norm, budget, target)
            taken, previous = H.shape[1], norm
            steps, largest = steps + taken, max(largest, float(torch.linalg.matrix_norm(H, 2)))
            square = H[:taken]
            lowest = min(lowest, float(torch.linalg.eigvalsh((square + square.T) / 2)[0]))
            coefficients = _least_squares(H, norm)
            for c, q in zip(coefficients.tolist(), basis, strict=False):
                tree.axpy_(v, c, q)
            if norm_after <= target or steps >= self.iterations:
                norm = norm_after
                break
            r = tree.sub(b, matvec(v))
            norm = tree.norm(r)
            floor = guards.rounding_floor(tree.eps(v), size, largest, max(reach, tree.norm(v)))
            if norm <= floor or norm > 0.999999 * previous:
                # a restart from rounding alone finds only more of it
                stopped = "rounding" if norm <= 10 * floor else "stagnation"
                break
        residual = guards.attainable_residual(norm, v, size, largest, reach)
        stats = guards.ended(
            stopped if norm > target else "tolerance",
            residual,
            self.tolerance,
            v,
            guards.relative_floor(v, size, largest),
            iterations=steps,
            curvature=None if math.isinf(lowest) else lowest,
        )
        return Solve(v, stats)

    def _cycle(
        self, matvec: Matvec, r: Params, norm: float, budget: int, target: float
    ) -> tuple[list[Params], Tensor, float]:
        """(orthonormal basis, Hessenberg matrix, residual norm) of at most `budget` steps."""
        basis = [tree.scale(1 / norm, r)]
        H = torch.zeros(budget + 1, budget, dtype=torch.float64)
        left = norm
        for k in range(budget):
            q = tree.clone(matvec(basis[k]))
            for _ in range(2):  # once is not enough in float32
                for i, p in enumerate(basis):
                    h = tree.dot(p, q)
                    H[i, k] += h
                    tree.axpy_(q, -h, p)
            beta = guards.require_finite(tree.norm(q), q)
            H[k + 1, k] = beta
            used = H[: k + 2, : k + 1]
            y = _least_squares(used, norm)
            left = float((_first(norm, k + 2) - used @ y).norm())
            if left <= target or beta <= 1e-14 * float(used.norm()):
                return basis, used, left
            basis.append(tree.scale_(q, 1 / beta))
        return basis, H, left


def _first(norm: float, length: int) -> Tensor:
    rhs = torch.zeros(length, dtype=torch.float64)
    rhs[0] = norm
    return rhs


def _least_squares(H: Tensor, norm: float) -> Tensor:
    """argmin ‖norm · e₁ − H y‖, of least norm where H is rank deficient."""
    rhs = _first(norm, H.shape[0])[:, None]
    return torch.linalg.lstsq(H, rhs, driver="gelsd").solution[:, 0]
