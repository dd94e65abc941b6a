"""Conjugate gradient. Hestenes and Stiefel (1952), J. Res. Nat. Bur. Standards 49(6).

The direction is updated with the *new* residual, β = ‖r₊‖² / ‖r‖²; two libraries of this field
use the old one, which is not conjugate gradient and does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.linear import guards
from bilevel.linear.lanczos import Tridiagonal
from bilevel.scalars.functions import larger, smaller, sqrt
from bilevel.types import Matvec, Params, Solve, SolverOption, Stopped

WATCHED = 5000
"""The most iterations that a solve may take by default whose end somebody else decides."""


@component
class CG:
    """Conjugate gradient for symmetric positive definite A; exact in dim(b) steps; 1 product a step.

    Stops at ‖b − A v‖ ≤ tolerance · ‖b‖, where rounding allows no smaller residual, after
    `iterations` steps, or at a direction of non-positive curvature pᵀA p ≤ 0, where the quadratic
    has no minimum: the iterate before it is returned with `converged=False` and the curvature in
    the stats. A start other than zero costs one more product. The condition estimate comes from
    the Ritz values that the coefficients hold, at no extra product (Golub and Meurant 2010, ch. 4);
    it is a lower bound, and None where a curvature was not positive.

    `iterations`: None for 20, and for 10 dim(b) + 100, 5,000 at most, where a `stop` decides.

    Differs from the textbook in:

    1. Curvature below 4 eps of the largest met (eps^1.5 with a preconditioner, which takes out what
       scales differ by) is rounding, and treated as zero: along such a p v would go off to overflow.
    2. The recursive residual goes on falling after b − A v has stalled. So the solve ends, with
       `stopped="rounding"`, where it is below a tenth of eps / 2 · (‖A‖ ‖v‖ + ‖b‖), and no
       residual smaller than that whole is reported. ‖A‖ is the largest curvature or Ritz value met.
    3. ‖p‖², for the curvature, is kept by recurrence: r is orthogonal to the direction before.
       M⁻¹ r is not, so with a preconditioner it is computed.
    4. r is replaced by a new tensor at each step rather than written into, and Ap is dropped before
       the next product: three vectors beside a product, and no memory given back and taken again.
    """

    accepts: ClassVar[frozenset[SolverOption]] = frozenset(
        {"precondition", "stop", "observe", "overwrite"}
    )
    iterations: PositiveInt | None = None
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> CG:
        """Converged as far as float64 allows."""
        return CG(iterations=guards.tight_iterations(dim), tolerance=1e-11)

    def solve(
        self,
        matvec: Matvec,
        b: Params,
        start: Params,
        *,
        precondition: Matvec | None = None,
        stop: Callable[[SolveProgress], bool] | None = None,
        observe: Callable[[Params, Params], None] | None = None,
        overwrite: bool = False,
    ) -> Solve:
        """With M, `precondition` r ↦ M⁻¹ r, the condition estimate is that of M⁻¹ A.

        `stop` is asked before every step, and at the end if nothing is left to solve (`last`).
        """
        v, r, size = guards.begin(matvec, b, start, overwrite=overwrite)
        reach, eps, accumulation = tree.norm(v), tree.eps(v), guards.accumulation_eps(v)
        z = precondition(r) if precondition else r
        rr = tree.dot(r, r)
        rz = tree.dot(r, z) if precondition else rr
        tolerance = guards.resolution(v) if stop else self.tolerance
        target = max(tolerance, guards.underflow_floor(v)) * size
        p, pp = tree.clone(z), tree.dot(z, z) if precondition else rr
        flat = accumulation**1.5 if precondition else 4 * accumulation
        ritz, curvature, largest, steps = Tridiagonal(), math.inf, 0.0, 0
        far = reach  # ‖v‖ is at most this: measured only where it may matter
        stopped: Stopped = "iterations"
        budget, by_entry = self._budget(b, watched=stop is not None), _on_cpu(v)
        while steps < budget:
            left = sqrt(rr)
            if stop and stop(
                SolveProgress(steps, v, rz, ritz, left, size, largest, left <= target)
            ):
                stopped = "asked"
                break
            if left <= target:
                stopped = "tolerance"
                break
            if not stop and guards.is_below_rounding(left, eps, size, largest, far):
                far = larger(reach, tree.norm(v))
                if guards.is_below_rounding(left, eps, size, largest, far):
                    stopped = "rounding"
                    break
            Ap = matvec(p)
            steps += 1
            pAp = guards.require_finite(tree.dot(p, Ap), p)
            curvature, largest = smaller(curvature, pAp / pp), larger(largest, pAp / pp)
            if not (pAp > flat * largest * pp and rz > 0):
                stopped, curvature = "curvature", smaller(curvature, 0.0 if rz > 0 else curvature)
                break
            alpha = rz / pAp
            rr = _update_residual(r, alpha, Ap, by_entry)
            if observe is not None:
                observe(p, Ap)
            del Ap  # or the next product is computed beside it: one vector more at the peak
            z = precondition(r) if precondition else r
            previous = rz
            rz = tree.dot(r, z) if precondition else rr
            beta = rz / previous
            ritz.append(alpha, larger(beta, 0.0), previous)
            _update_direction(v, alpha, p, beta, z, by_entry)
            far += alpha * sqrt(pp)
            pp = tree.dot(p, p) if precondition else rr + beta**2 * pp
        largest = largest if precondition else ritz.largest
        length = tree.norm(v)
        residual = guards.attainable_residual(sqrt(rr), v, size, largest, reach, length)
        stats = guards.ended(
            stopped,
            residual,
            tolerance,
            v,
            guards.relative_floor(v, size, largest, length=length),
            iterations=steps,
            curvature=None if curvature == math.inf else curvature,
            # of positive Ritz values alone, where A is not positive definite
            condition=ritz.condition if curvature > 0 else None,
        )
        return Solve(v, stats)

    def _budget(self, b: Params, *, watched: bool) -> int:
        if self.iterations is not None:
            return self.iterations
        return min(10 * tree.size(b) + 100, WATCHED) if watched else 20


@dataclass(frozen=True)
class SolveProgress:
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
    """Whether nothing is left to solve, so that there will be no other step."""

    @property
    def rounded(self) -> float:
        """⟨r, M⁻¹ r⟩ with no smaller an r than rounding leaves."""
        left = guards.attainable_residual(self.r, self.v, self.size, self.largest) * self.size
        return self.rz * max(1.0, left / self.r) ** 2 if self.r else self.rz

    def energy(self, since: int) -> float:
        """‖v − v_since‖² in the norm of A: the sum of α ⟨r, M⁻¹ r⟩ over the steps between.

        Hestenes and Stiefel (1952), theorem 6:1.
        """
        return sum(self.ritz.energies[since : self.steps])


class PairSelection:
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


def _update_residual(r: Params, alpha: float, Ap: Params, by_entry: bool) -> float:
    """r ← r − alpha · Ap; returns ‖r‖².

    The entries of r are replaced by new ones: written into, with nothing but Ap freed, they made
    the allocator return 60 MB to the system at every step, and take them again. On the CPU each
    is summed up while it is in the cache.
    """
    if not by_entry:
        r.update(tree.axpy(-alpha, Ap, r))
        return tree.dot(r, r)
    parts, is_double = [], True
    for name, entry in r.items():
        is_double = is_double and entry.dtype is torch.float64
        r[name] = entry = tree.add_scaled(entry, -alpha, Ap[name])
        flat = tree.flat_wide(entry)
        parts.append(torch.dot(flat, flat))
    total = tree.total(parts)
    return total if is_double or 1e-30 < total < math.inf else tree.dot(r, r)


def _update_direction(
    v: Params, alpha: float, p: Params, beta: float, z: Params, by_entry: bool
) -> None:
    """v ← v + alpha · p, then p ← z + beta · p; on the CPU an entry at a time."""
    if not by_entry:
        tree.axpy_(v, alpha, p)
        tree.axpy_(tree.scale_(p, beta), 1.0, z)
        return
    for name, entry in v.items():
        v[name] = tree.add_scaled(entry, alpha, p[name], out=entry)
        p[name] = tree.add_scaled(z[name], beta, p[name], out=p[name])


def _on_cpu(a: Params) -> bool:
    """Whether foreach functions are but a loop over the entries, and so a pass over memory each.

    Not for what ranks hold together: their sum over entries is one of `tree`.
    """
    return bool(a) and tree.holders(a) is None and all(entry.is_cpu for entry in a.values())
