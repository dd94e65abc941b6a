"""Conjugate gradient. Hestenes and Stiefel (1952), J. Res. Nat. Bur. Standards 49(6).

The direction is updated with the *new* residual, β = ‖r₊‖² / ‖r‖²; two libraries of this field
use the old one, which is not conjugate gradient and does not converge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.types import Matvec, Params, Solve, Stats, component


@component
class CG:
    """Conjugate gradient for symmetric positive definite A; exact in dim(b) steps; 1 product a step.

    Stops at ‖b − A v‖ ≤ tolerance · ‖b‖, after `iterations` steps, or at a direction of
    non-positive curvature pᵀA p ≤ 0, where the quadratic has no minimum: the iterate before it is
    returned with `converged=False` and the curvature in the stats. A start other than zero costs
    one more product. The condition estimate comes from the Ritz values that the coefficients
    hold, at no extra product (Golub and Meurant 2010, ch. 4); it is a lower bound.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = Field(default=1e-6)

    def tight(self, dim: int) -> CG:
        """Converged as far as float64 allows."""
        return CG(iterations=min(20 * dim + 100, 20_000), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, products = residual(matvec, b, start)
        target, rr = self.tolerance * tree.norm(b), tree.dot(r, r)
        p, pp, ritz, curvature, steps = tree.clone(r), rr, Tridiagonal(), math.inf, 0
        while steps < self.iterations and math.sqrt(rr) > target:
            Ap = matvec(p)
            products, steps = products + 1, steps + 1
            pAp = finite(tree.dot(p, Ap))
            curvature = min(curvature, pAp / pp)
            if not pAp > 0:
                break
            alpha = rr / pAp
            tree.axpy_(v, alpha, p)
            tree.axpy_(r, -alpha, Ap)
            del Ap  # or the next product is computed beside it: one vector more at the peak
            rr, previous = tree.dot(r, r), rr
            beta = rr / previous
            ritz.append(alpha, beta)
            tree.axpy_(tree.scale_(p, beta), 1.0, r)
            pp = rr + beta**2 * pp  # ‖p‖²: r is orthogonal to the old direction
        relative = attained(math.sqrt(rr), v, b, ritz.largest)
        return Solve(
            v,
            Stats(
                iterations=steps,
                residual=relative,
                curvature=None if math.isinf(curvature) else curvature,
                condition=ritz.condition,
                converged=relative <= self.tolerance,
            ),
        )


def residual(matvec: Matvec, b: Params, start: Params) -> tuple[Params, Params, int]:
    """(v, b − A v, products used) at the start of a solve; a zero start or b costs nothing."""
    if tree.norm(b) == 0 or tree.norm(start) == 0:
        return tree.zeros_like(b), tree.clone(b), 0
    return tree.clone(start), tree.sub(b, matvec(start)), 1


def finite(product: float) -> float:
    """pᵀA p, or `ConvergenceError` if it is NaN or infinite: such a product must not pass for zero."""
    if not math.isfinite(product):
        raise ConvergenceError(
            "a product with the lower Hessian is not finite at this point: a second derivative "
            "is singular there (√, norm or abs at 0), or overflows; move y off it, or use float64"
        )
    return product


def attained(recursive: float, v: Params, b: Params, largest: float) -> float:
    """‖b − A v‖ / ‖b‖ from a recursive residual, no better than rounding allows.

    The recursion goes on falling after b − A v itself has stalled near eps (‖A‖ ‖v‖ + ‖b‖).
    """
    size = tree.norm(b)
    if size == 0:
        return 0.0
    eps = max(torch.finfo(entry.dtype).eps for entry in b.values())
    floor = 0.5 * eps * (largest * tree.norm(v) / size + 1)
    return max(recursive / size, floor if recursive > 0 else 0.0)


@dataclass
class Tridiagonal:
    """The Lanczos matrix that conjugate gradient's coefficients hold, and its eigenvalues."""

    diagonal: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    _last: tuple[float, float] = (math.inf, 0.0)
    _values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def append(self, alpha: float, beta: float) -> None:
        """Add one step: its length alpha and the ratio beta of squared residuals after and before."""
        previous_alpha, previous_beta = self._last
        self.diagonal.append(1 / alpha + previous_beta / previous_alpha)
        self.off.append(math.sqrt(beta) / alpha)
        self._last = (alpha, beta)

    def ritz(self) -> torch.Tensor:
        """Ritz values in ascending order, float64. Cubic in the steps, so found once for them all."""
        if len(self._values) == len(self.diagonal):
            return self._values
        off = torch.tensor(self.off[:-1], dtype=torch.float64)
        main = torch.tensor(self.diagonal, dtype=torch.float64)
        self._values = torch.linalg.eigvalsh(main.diag() + off.diag(1) + off.diag(-1))
        return self._values

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound of ‖A‖; 0 before the first step."""
        return float(self.ritz()[-1]) if self.diagonal else 0.0

    @property
    def condition(self) -> float | None:
        """Largest over smallest Ritz value, or None where the smallest is not positive."""
        if not self.diagonal:
            return None
        values = self.ritz()
        return float(values[-1] / values[0]) if values[0] > 0 else None
