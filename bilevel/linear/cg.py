"""Conjugate gradient. Hestenes and Stiefel (1952), J. Res. Nat. Bur. Standards 49(6).

The direction is updated with the *new* residual, β = ‖r₊‖² / ‖r‖²; two libraries of this field
use the old one, which is not conjugate gradient and does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.linear.guards import attained, finite, length, nothing, residual, rounding
from bilevel.linear.lanczos import Tridiagonal
from bilevel.types import Matvec, Params, Solve, Stats


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
