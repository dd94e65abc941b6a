"""Conjugate gradient. Hestenes and Stiefel (1952), J. Res. Nat. Bur. Standards 49(6).

The direction is updated with the *new* residual, β = ‖r₊‖² / ‖r‖²; two libraries of this field
use the old one, which is not conjugate gradient and does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    returned with `converged=False` and the curvature in the stats. Curvature below 4 eps of the
    largest met (eps^1.5 with a preconditioner) is rounding, and taken for 0. A start other than
    zero costs one more product. The condition estimate comes from the Ritz values that the
    coefficients hold, at no extra product (Golub and Meurant 2010, ch. 4); it is a lower bound, and
    None where a curvature was not positive.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = Field(default=1e-6)

    def tight(self, dim: int) -> CG:
        """Converged as far as float64 allows."""
        return CG(iterations=min(20 * dim + 100, 20_000), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        v, r, _ = residual(matvec, b, start)
        return self.run(matvec, v, r, length(b))

    def run(
        self,
        matvec: Matvec,
        v: Params,
        r: Params,
        size: float,
        *,
        precondition: Matvec | None = None,
        enough: Callable[[Progress], bool] | None = None,
        keep: Sample | None = None,
    ) -> Solve:
        """`solve` from v, with what a caller knows beside the system.

        `r` is b − A v and `size` ‖b‖. Both v and r are the solve's from now on, to write into:
        with nothing copied it holds v, r and p beside a product. `precondition` is
        r ↦ M⁻¹ r with M symmetric positive definite: the condition estimate is then that of M⁻¹A.
        `enough` may stop the solve; it is asked before every step, and at the end if that is the
        tolerance. `keep` is given the pairs
        (p, A p).
        """
        z = precondition(r) if precondition else r
        rr, rz = tree.dot(r, r), tree.dot(r, z)
        target = max(self.tolerance, nothing(v)) * size
        reach, p, pp = tree.norm(v), tree.clone(z), tree.dot(z, z)
        ritz, curvature, largest, steps, stopped = Tridiagonal(), math.inf, 0.0, 0, False
        # what scales differ by is no rounding where a preconditioner takes it out
        flat, ended = rounding(v) ** 1.5 if precondition else 4 * rounding(v), False
        while steps < self.iterations:
            left = math.sqrt(rr)
            if enough and enough(Progress(steps, v, rz, ritz, left, size, largest, left <= target)):
                stopped = True
                break
            if left <= target:
                break
            Ap = matvec(p)
            steps += 1
            pAp = finite(tree.dot(p, Ap))
            curvature, largest = min(curvature, pAp / pp), max(largest, pAp / pp)
            # along a p of no curvature but rounding v would go off to overflow
            if not (pAp > flat * largest * pp and rz > 0):
                ended, curvature = True, min(curvature, 0.0 if rz > 0 else curvature)
                break
            alpha = rz / pAp
            rr = tree.less_(r, alpha, Ap)
            if keep is not None:
                keep.offer(p, Ap)
            del Ap  # or the next product is computed beside it: one vector more at the peak
            z = precondition(r) if precondition else r
            previous = rz
            rz = tree.dot(r, z) if precondition else rr
            beta = rz / previous
            ritz.append(alpha, max(beta, 0.0), previous)
            tree.turn_(v, alpha, p, beta, z)
            # ‖p‖²: r is orthogonal to the old direction, M⁻¹ r is not
            pp = tree.dot(p, p) if precondition else rr + beta**2 * pp
        largest = largest if precondition else ritz.largest
        relative = attained(math.sqrt(rr), v, size, largest, reach)
        return Solve(
            v,
            Stats(
                iterations=steps,
                residual=relative,
                curvature=None if math.isinf(curvature) else curvature,
                # of positive Ritz values alone, where A is not positive definite
                condition=ritz.condition if curvature > 0 else None,
                converged=not ended and (stopped or relative <= self.tolerance),
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


def rounding(b: Params) -> float:
    """The largest eps of the types in which the entries of b are summed."""
    return max(torch.finfo(tree.wide(entry.new_empty(0)).dtype).eps for entry in b.values())


def length(b: Params) -> float:
    """‖b‖, or `ConvergenceError` where its square is no number of this dtype although b is one."""
    size = tree.norm(b)
    if not math.isfinite(size) or (size == 0 and any(bool(entry.any()) for entry in b.values())):
        raise ConvergenceError(
            f"the right-hand side, ∇y F, has entries so {'large' if size else 'small'} that its "
            "square is not a number in this dtype, or is 0; scale upper_loss, or use float64"
        )
    return size


def nothing(b: Params) -> float:
    """The relative residual below which a recursion only underflows: eps²."""
    return rounding(b) ** 2


def attained(recursive: float, v: Params, size: float, largest: float, reach: float = 0.0) -> float:
    """‖b − A v‖ / ‖b‖ from a recursive residual and ‖b‖ = size, no better than rounding allows.

    The recursion goes on falling after b − A v itself has stalled near eps (‖A‖ ‖v‖ + ‖b‖), with
    the longest v on the way: `reach` is the length of the start.
    """
    if size == 0:
        return 0.0
    floor = 0.5 * tree.eps(v) * (largest * max(tree.norm(v), reach) / size + 1)
    return max(recursive / size, floor if recursive > 0 else 0.0)


@dataclass
class Tridiagonal:
    """The Lanczos matrix that conjugate gradient's coefficients hold, and its eigenvalues."""

    diagonal: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    """What each step took from ‖v − A⁻¹b‖² in the norm of A."""
    _last: tuple[float, float] = (math.inf, 0.0)
    _values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def append(self, alpha: float, beta: float, rz: float = 0.0) -> None:
        """Add one step: its length alpha, the ratio beta of ⟨r, M⁻¹ r⟩ after and before, that before."""
        self.energies.append(alpha * rz)
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

    @property
    def smallest(self) -> float | None:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self.ritz()[0]) if self.diagonal else None


@dataclass(frozen=True)
class Progress:
    """How far a solve has come, for whoever decides whether it is far enough."""

    steps: int
    v: Params
    """The iterate, which the solve goes on writing into."""
    rz: float
    """⟨r, M⁻¹ r⟩ with r = b − A v."""
    ritz: Tridiagonal
    r: float
    """‖r‖, by recursion."""
    size: float
    """‖b‖."""
    largest: float
    """The largest pᵀA p / pᵀp met."""
    last: bool = False
    """Whether the tolerance is reached, so that there will be no other step."""

    @property
    def rounded(self) -> float:
        """⟨r, M⁻¹ r⟩ with no smaller an r than rounding leaves."""
        left = attained(self.r, self.v, self.size, self.largest) * self.size
        return self.rz * max(1.0, left / self.r) ** 2 if self.r else self.rz

    def energy(self, since: int) -> float:
        """‖v − v_since‖² in the norm of A: the sum of α ⟨r, M⁻¹ r⟩ over the steps between.

        Hestenes and Stiefel (1952), theorem 6:1.
        """
        return sum(self.ritz.energies[since : self.steps])


class Sample:
    """An even selection of at most `room` of the pairs (p, A p) of a solve, however long it is."""

    def __init__(self, room: int) -> None:
        self._room, self._stride, self._seen = max(1, room), 1, 0
        self.pairs: list[tuple[Params, Params]] = []

    def offer(self, p: Params, Ap: Params) -> None:
        """Keep the pair if its turn has come; half of those kept make room for it."""
        if self._seen % self._stride == 0:
            if len(self.pairs) == self._room:
                self.pairs, self._stride = self.pairs[::2], 2 * self._stride
            if self._seen % self._stride == 0:
                self.pairs.append((tree.clone(p), Ap))
        self._seen += 1
