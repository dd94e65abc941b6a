"""Conjugate gradient on every task of a batch at once. Hestenes and Stiefel (1952), per block."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.linear.guards import finite, length, residual, rounding
from bilevel.types import Matvec, Params, Solve, Stats


@component
class TaskCG:
    """`cg` with step lengths of each task's own; A is block diagonal, a block for a leading index.

    For tasks that are batched along the first dimension of every entry of y and share no entry of
    A, as those of `over_tasks`. One product of the whole is a step of each task, so it ends after
    as many steps as the worst task needs alone; `cg` sees one system with the eigenvalues of all.
    A task stops where ‖b − A v‖ ≤ tolerance · ‖b‖ of its own, or at a pᵀA p ≤ 0, eps^1.5 of the
    largest met taken for 0, and stays put.
    1 product a step, 1 for a start other than zero, and 1 at the end for the true residual: where
    tasks are coupled the steps are wrong, and this is how it shows. `converged` holds all tasks to
    twice the tolerance; `curvature` is the smallest of all; no condition number.

    Raises:
        ProblemError: the entries disagree about the number of tasks.
        ConvergenceError: a product is not finite.
    """

    iterations: PositiveInt = 20
    tolerance: NonNegativeFloat = 1e-6

    def tight(self, dim: int) -> TaskCG:
        """Converged as far as float64 allows."""
        return TaskCG(iterations=min(20 * dim + 100, 20_000), tolerance=1e-11)

    def solve(self, matvec: Matvec, b: Params, start: Params) -> Solve:
        _require_tasks(b)
        length(b)
        size = _dots(b, b).sqrt()
        # itself where it may be: the product at the very start may be known to who asks
        begin = start if bool((size > 0).all()) else _times((size > 0).double(), start)
        v, r, _ = residual(matvec, b, begin)
        p, rr, curvature, steps = tree.clone(r), _dots(r, r), math.inf, 0
        active = rr.sqrt() > self.tolerance * size
        largest, flat = torch.zeros_like(rr), rounding(b) ** 1.5
        while steps < self.iterations and bool(active.any()):
            Ap, steps = matvec(p), steps + 1
            pAp, pp = _dots(p, Ap), _dots(p, p)
            finite(float(pAp.sum()))
            curvature = min(curvature, float((pAp / pp)[active].min()))
            largest = torch.where(active, torch.maximum(largest, pAp / pp), largest)
            # along a p of no curvature but rounding v would go off to overflow
            active = active & (pAp > flat * largest * pp)
            alpha = torch.where(active, rr / pAp, 0.0)
            v, r = tree.add(v, _times(alpha, p)), tree.sub(r, _times(alpha, Ap))
            del Ap  # or the next product is computed beside it: one vector more at the peak
            rr, previous = _dots(r, r), rr
            p = tree.add(r, _times(torch.where(active, rr / previous, 0.0), p))
            active = active & (rr.sqrt() > self.tolerance * size)
        left = tree.sub(b, matvec(v)) if steps else r
        reached = _dots(left, left).sqrt() <= 2 * self.tolerance * size
        stats = Stats(
            iterations=steps,
            residual=tree.norm(left) / (tree.norm(b) or 1.0),
            curvature=None if math.isinf(curvature) else curvature,
            converged=bool(reached.all()),
        )
        return Solve(v, stats)


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
