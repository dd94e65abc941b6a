"""Conjugate gradient on every task of a batch at once. Hestenes and Stiefel (1952), per block."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.linear import guards
from bilevel.scalars.functions import smaller
from bilevel.types import Matvec, Params, Solve, Stats, Stopped


@component
class TaskCG:
    """`cg` with step lengths of each task's own; A is block diagonal, a block for a leading index.

    For tasks that are batched along the first dimension of every entry of y and share no entry of
    A, as those of `over_tasks`. One product of the whole is a step of each task, so it ends after
    as many steps as the worst task needs alone; `cg` sees one system with the eigenvalues of all.
    A task stops where ‖b − A v‖ ≤ tolerance · ‖b‖ of its own, where rounding allows no smaller
    residual, or at a pᵀA p ≤ 0, eps^1.5 of the largest met treated as zero, and stays put.
    1 product a step, 1 for a start other than zero, and 1 at the end for the true residual: where
    tasks are coupled the steps are wrong, and this is how it shows. `converged` holds all tasks to
    twice the tolerance, or to ten times what rounding leaves; `curvature` is the smallest of all; no condition number.

    Raises:
        ProblemError: the entries disagree about the number of tasks.
        ConvergenceError: a product is not finite.
    """

    needs_whole: ClassVar[str] = "solver: cg"
    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> TaskCG:
        """Converged as far as float64 allows."""
        return TaskCG(iterations=guards.tight_iterations(dim), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        _require_tasks(b)
        guards.checked_norm(b)
        size = _dots(b, b).sqrt()
        # itself where it may be: the product at the very start may be known to who asks
        begin = start if bool((size > 0).all()) else _times((size > 0).double(), start)
        v, r, _ = guards.begin(matvec, b, begin)
        p, rr, curvature, steps = tree.clone(r), _dots(r, r), math.inf, 0
        largest, flat = torch.zeros_like(rr), guards.accumulation_eps(b) ** 1.5
        reach, eps = _dots(v, v).sqrt(), tree.eps(b)
        is_flat, floor = torch.zeros_like(rr, dtype=torch.bool), 0.05 * eps * size
        active = rr.sqrt() > torch.maximum(self.tolerance * size, floor)
        while steps < self.iterations and bool(active.any()):
            Ap, steps = matvec(p), steps + 1
            pAp, pp = _dots(p, Ap), _dots(p, p)
            guards.require_finite(pAp.sum().item(), p)
            curvature = smaller(curvature, torch.where(active, pAp / pp, math.inf).min().item())
            largest = torch.where(active, torch.maximum(largest, pAp / pp), largest)
            # along a p of no curvature but rounding v would go off to overflow
            is_flat = is_flat | (active & ~(pAp > flat * largest * pp))
            active = active & ~is_flat
            alpha = torch.where(active, rr / pAp, 0.0)
            v, r = tree.add(v, _times(alpha, p)), tree.sub(r, _times(alpha, Ap))
            del Ap  # or the next product is computed beside it: one vector more at the peak
            rr, previous = _dots(r, r), rr
            p = tree.add(r, _times(torch.where(active, rr / previous, 0.0), p))
            reach = torch.maximum(reach, _dots(v, v).sqrt())
            floor = 0.1 * guards.rounding_floor(eps, size, largest, reach)
            active = active & (rr.sqrt() > torch.maximum(self.tolerance * size, floor))
        left = tree.sub(b, matvec(v)) if steps else r
        stopped = self._stopped(left, v, size, largest, is_flat, steps)
        stats = Stats(
            iterations=steps,
            residual=tree.norm(left) / (tree.norm(b) or 1.0),
            curvature=None if curvature == math.inf else curvature,
            converged=stopped in ("tolerance", "rounding"),
            stopped=stopped,
        )
        return Solve(v, stats)

    def _stopped(
        self, left: Params, v: Params, size: Tensor, largest: Tensor, is_flat: Tensor, steps: int
    ) -> Stopped:
        """Why it ended, by the true residual of each task."""
        off = _dots(left, left).sqrt()
        within = off <= 2 * self.tolerance * size
        floor = guards.rounding_floor(tree.eps(v), size, largest, _dots(v, v).sqrt())
        # the true residual of a product that sums many numbers is a few times the floor
        solved = within | (off <= torch.minimum(10 * floor, guards.resolved(v) * size))
        if bool(solved.all()):
            return "tolerance" if bool(within.all()) else "rounding"
        if bool((is_flat & ~solved).any()):
            return "curvature"
        return "iterations" if steps >= self.iterations else "stagnation"


def _require_tasks(b: Params) -> None:
    """The leading dimension of each entry counts the same tasks."""
    if len({entry.shape[:1] for entry in b.values()}) == 1 and all(e.dim() for e in b.values()):
        return
    shapes = {name: tuple(entry.shape) for name, entry in b.items()}
    raise ProblemError(
        f"task_cg: the entries of y have the shapes {shapes}, and tasks are batched along a first "
        "dimension that all of them share; use solver: cg"
    )


def _dots(a: Params, b: Params) -> Tensor:
    """⟨a, b⟩ of each task, float64."""
    products = [tree.wide(a[name]) * tree.wide(b[name]) for name in a]
    return torch.stack([e.reshape(len(e), -1).sum(1).double() for e in products]).sum(0)


def _times(factors: Tensor, a: Params) -> Params:
    """Each task of a times its factor."""
    return tree.map(lambda e: e * factors.to(e).view(-1, *[1] * (e.dim() - 1)), a)
