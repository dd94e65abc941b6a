"""Nyström approximation of the lower Hessian. Hataya and Yamada (2023), arXiv:2302.09726."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.linear.guards import checked_norm, require_finite
from bilevel.scalars.functions import call
from bilevel.scalars.matrices import least_squares
from bilevel.types import Matvec, Params, Solve, Stats


@component
class Nystrom:
    """(H_k + rho I)⁻¹ b with H_k = C W⁺ Cᵀ, C = H[:, K], W = H[K, K] for `rank` random columns K.

    `rank` products whatever b is, and rank · dim(b) memory; the inverse by Woodbury,
    (1/rho) b − (1/rho²) C (W + CᵀC / rho)⁻¹ Cᵀ b. Exact for (H + rho I) v = b at full rank, so
    `rho` is a damping; the error is bounded by that of the low-rank approximation (thm. 1 there).
    The residual reported is that of the undamped A v = b, which costs one more product. There is no
    tolerance to reach, and nothing is said of the curvature.

    Raises:
        ConvergenceError: a product is not finite.
    """

    needs_whole: ClassVar[str] = "solver: cg, minres or neumann"
    approximate: ClassVar[bool] = True
    rank: PositiveInt = 10
    rho: PositiveFloat = 1e-2
    seed: int = 0

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        size = checked_norm(b)
        if size == 0:
            return Solve(
                tree.zeros_like(b), Stats(residual=0.0, converged=True, stopped="tolerance")
            )
        flat = tree.wide(tree.flatten(b))
        chosen = call(_chosen, self.seed, len(flat), self.rank).to(flat.device)
        C = torch.stack([self._column(matvec, i, flat, b) for i in chosen], dim=1)
        require_finite(C.abs().max().item(), b)
        solution = tree.cast(self._inverse(C, C[chosen], flat), b)
        residual = tree.norm(tree.sub(b, matvec(solution))) / size
        stats = Stats(iterations=len(chosen), residual=residual)
        return Solve(solution, stats)

    def _column(self, matvec: Matvec, i: Tensor, flat: Tensor, like: Params) -> Tensor:
        unit = torch.zeros_like(flat)
        unit[i] = 1
        return tree.flatten(matvec(tree.cast(unit, like))).to(flat)

    def _inverse(self, C: Tensor, W: Tensor, b: Tensor) -> Tensor:
        inner = (W + W.T) / 2 + C.T @ C / self.rho
        return b / self.rho - C @ least_squares(inner, C.T @ b) / self.rho**2


def _chosen(seed: int, size: int, rank: int) -> Tensor:
    """The numbers of `rank` columns out of `size`, or of all of them."""
    return torch.randperm(size, generator=rng.stream(seed, "nystrom"))[:rank]
