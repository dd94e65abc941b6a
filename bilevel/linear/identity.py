"""A⁻¹ ≈ scale · I: Jacobian-free backpropagation. Fung et al. (2021), arXiv:2103.12803."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveFloat

from bilevel import tree
from bilevel.components import component
from bilevel.types import Matvec, Params, Solve, Stats


@component
class Identity:
    """v = scale · b: the first term of the Neumann series; no product.

    For a contraction y ↦ y − scale ∇y G this keeps an acute angle with the solution where the
    lower Hessian is well conditioned (Fung et al. 2021, thm. 3.1), and is not an approximation of its
    size. Nothing is known of the residual or the curvature, so none is reported.
    """

    approximate: ClassVar[bool] = True
    scale: PositiveFloat = 1.0

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        return Solve(tree.scale(self.scale, b), Stats())
