"""Restarted GMRES for any square A. Saad and Schultz (1986), SIAM J. Sci. Stat. Comput. 7(3)."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.linear import guards
from bilevel.scalars.functions import call, larger, smaller
from bilevel.scalars.matrices import least_squares, numbers_of, tensor_of
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
            steps += taken
            largest = larger(largest, call(torch.linalg.matrix_norm, H, 2).item())
            square = H[:taken]
            lowest = smaller(lowest, call(torch.linalg.eigvalsh, (square + square.T) / 2)[0].item())
            coefficients = least_squares(H, tensor_of([norm, *[0.0] * taken]))
            for c, q in zip(numbers_of(coefficients), basis, strict=True):
                tree.axpy_(v, c, q)
            if norm_after <= target or steps >= self.iterations:
                norm = norm_after
                break
            r = tree.sub(b, matvec(v))
            norm = tree.norm(r)
            floor = guards.rounding_floor(tree.eps(v), size, largest, larger(reach, tree.norm(v)))
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
            curvature=None if lowest == math.inf else lowest,
        )
        return Solve(v, stats)

    def _cycle(
        self, matvec: Matvec, r: Params, norm: float, budget: int, target: float
    ) -> tuple[list[Params], Tensor, float]:
        """(orthonormal basis, Hessenberg matrix, residual norm) of at most `budget` steps."""
        basis, columns = [tree.scale(1 / norm, r)], []
        while True:
            q = tree.clone(matvec(basis[-1]))
            column = [0.0] * len(basis)
            for _ in range(2):  # once is not enough in float32
                for i, p in enumerate(basis):
                    h = tree.dot(p, q)
                    column[i] += h
                    tree.axpy_(q, -h, p)
            beta = guards.require_finite(tree.norm(q), q)
            columns.append([*column, beta])
            H = _hessenberg(columns)
            rhs = tensor_of([norm, *[0.0] * len(columns)])
            left = (rhs - H @ least_squares(H, rhs)).norm().item()
            if left <= target or beta <= 1e-14 * H.norm().item() or len(columns) == budget:
                return basis, H, left
            basis.append(tree.scale_(q, 1 / beta))


def _hessenberg(columns: list[list[float]]) -> Tensor:
    """The matrix of columns that each have one number more than the one before; zeros below them."""
    rows = len(columns) + 1
    return tensor_of([[*column, *[0.0] * (rows - len(column))] for column in columns]).T
