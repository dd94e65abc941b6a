"""The whole matrix and a direct solve: the truth for small problems."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.linear.guards import checked_norm, ended, require_finite
from bilevel.scalars.functions import call
from bilevel.scalars.matrices import least_squares
from bilevel.types import Matvec, Params, Solve


@component
class Dense:
    """A v = b by LU of the full matrix; exact to rounding; dim(b) products, dim(b)² memory.

    Reports the true residual, the smallest eigenvalue of the symmetric part (`curvature`) and the
    2-norm condition number. A singular matrix is solved in the least-squares sense and flagged
    `converged=False`; so is one whose rounding leaves a residual above 1e-2.

    Raises:
        ProblemError: dim(b) > limit.
        ConvergenceError: the matrix or b is not finite.
    """

    needs_whole: ClassVar[str] = "solver: cg, minres or gmres"
    limit: PositiveInt = 4096

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        dim = tree.size(b)
        if dim > self.limit:
            raise ProblemError(
                f"dense needs a {dim} x {dim} matrix; limit = {self.limit}. "
                "Use solver=cg, or raise `limit`"
            )
        checked_norm(b)
        rhs, A = tree.wide(tree.flatten(b)), tree.wide(matrix(matvec, b))
        require_finite(A.abs().max().item() if dim else 0.0, b)
        spectrum = call(torch.linalg.svdvals, A)
        eps = torch.finfo(A.dtype).eps
        singular = bool(spectrum[-1] <= dim * eps * spectrum[0])
        v = least_squares(A, rhs) if singular else call(torch.linalg.solve, A, rhs)
        size = rhs.norm().item()
        residual = (rhs - A @ v).norm().item() / size if size else 0.0
        stats = ended(
            "stagnation" if singular else "rounding",
            residual,
            0.0 if singular else max(1e-6, eps**0.5),
            b,
            iterations=dim,
            curvature=call(torch.linalg.eigvalsh, (A + A.T) / 2)[0].item(),
            condition=None if singular else (spectrum[0] / spectrum[-1]).item(),
        )
        return Solve(tree.cast(v, b), stats)


def matrix(matvec: Matvec, like: Params) -> Tensor:
    """The matrix of a linear map on trees shaped like `like`, one product a column."""
    identity = torch.eye(tree.size(like), dtype=tree.flatten(like).dtype)
    device = next(iter(like.values())).device
    columns = [tree.flatten(matvec(tree.unflatten(e.to(device), like))) for e in identity]
    return torch.stack(columns, dim=1)
