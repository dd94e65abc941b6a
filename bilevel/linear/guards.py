"""What every linear solver refuses, how one begins and ends: the same way in all."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch

from bilevel import tree
from bilevel.errors import ConvergenceError, require_kind
from bilevel.scalars.functions import larger, smaller
from bilevel.types import LinearSolver, Matvec, Params, Solve, Stats, Stopped

RESOLVED = 1e-2
"""See `resolved`."""


def solved(solver: LinearSolver, matvec: Matvec, b: Params, start: Params, **options: Any) -> Solve:
    """What a solver, which may be somebody's own, says A⁻¹ b is.

    Raises:
        CheckError: that is no `Solve`, or its solution has other names, shapes or dtypes than b.
    """
    found = solver.solve(matvec, b, start, **options)
    name = f"{type(solver).__name__}.solve"
    require_kind(found, Solve, f"what {name} returns")
    require_kind(found.stats, Stats, f"the stats that {name} returns")
    tree.require_like(found.solution, b, f"{name} must return a solution with the form of b,")
    return found


def begin(
    matvec: Matvec, b: Params, start: Params, *, overwrite: bool = False
) -> tuple[Params, Params, float]:
    """(v, r = b − A v, ‖b‖) at the start of a solve, v and r its own; 1 product if v ≠ 0.

    v = 0 where `start` or b is. With `overwrite` they are `start` and b, written into.

    Raises:
        ConvergenceError: b is not finite, or its square is not.
    """
    size = checked_norm(b)
    cold = tree.norm(start) == 0
    if size == 0 or cold:
        v = start if overwrite and cold else tree.zeros_like(b)
        return v, b if overwrite else tree.clone(b), size
    if overwrite:
        return start, tree.axpy_(b, -1.0, matvec(start)), size
    return tree.clone(start), tree.sub(b, matvec(start)), size


def checked_norm(b: Params) -> float:
    """‖b‖, or `ConvergenceError` where b or its square is not a number of its dtype."""
    size = tree.norm(b)
    if size < math.inf and (size > 0 or not any(bool(entry.any()) for entry in b.values())):
        return size
    for name, entry in b.items():
        if not bool(entry.isfinite().all()):
            raise ConvergenceError(
                f"the right-hand side, ∇y F, has entries in {name!r} that are "
                f"{'NaN' if bool(entry.isnan().any()) else 'infinite'}: upper_loss has no "
                "derivative there (√, norm or log at 0), or overflows; move y off that point, or "
                "mend upper_loss"
            )
    raise ConvergenceError(
        f"the right-hand side, ∇y F, has entries so {'large' if size else 'small'} that their "
        f"squares are {'infinite' if size else '0'} even in float64; scale upper_loss"
    )


def require_finite(product: float, b: Params) -> float:
    """pᵀA p, or `ConvergenceError` if it is NaN or infinite: such a product must not pass for zero."""
    if not -math.inf < product < math.inf:
        raise ConvergenceError(
            "a product with the lower Hessian is not finite at this point: a second derivative "
            "is singular there (√, norm or abs at 0), or overflows; move y off it, smooth "
            f"lower_loss there{tree.or_wider(b)}"
        )
    return product


def accumulation_eps(b: Params) -> float:
    """The largest eps of the types in which the entries of b are summed."""
    return max(torch.finfo(tree.summed_in(entry)).eps for entry in b.values())


def underflow_floor(b: Params) -> float:
    """The relative residual below which a recursion only underflows: eps²."""
    return accumulation_eps(b) ** 2


def resolution(b: Params) -> float:
    """The relative residual below which nothing is left to solve, in the dtype of b: 10 eps."""
    return 10 * tree.eps(b)


def resolved(b: Params) -> float:
    """The largest relative residual that counts as solved where rounding allows no smaller one.

    A residual at the floor is eps / 2 · ‖A‖ ‖v‖ / ‖b‖, and that is eps / 2 · condition where v lies
    along the flattest direction: v is then known to a few per cent. √eps in 16-bit types.
    """
    return max(RESOLVED, tree.eps(b) ** 0.5)


def rounding_floor(eps: float, size: Any, largest: Any, length: Any) -> Any:
    """The ‖b − A v‖ that rounding leaves: eps / 2 · (‖A‖ ‖v‖ + ‖b‖), with the longest v on the way.

    There v is backward stable: it solves a system that differs from this one by rounding alone.
    """
    return 0.5 * eps * (largest * length + size)


def is_below_rounding(left: float, eps: float, size: float, largest: float, length: float) -> bool:
    """Whether a recursive residual says nothing any more: a tenth of the floor, which is the worst case.

    What is left to solve is then small beside what rounding has done, and not of its size.
    """
    return left <= 0.1 * rounding_floor(eps, size, largest, length)


def relative_floor(
    v: Params, size: float, largest: float, reach: float = 0.0, length: float | None = None
) -> float:
    """`rounding_floor` of v, relative to ‖b‖ = size; `reach` is the length of the start.

    `length` is ‖v‖, where it is known.
    """
    if not size:
        return 0.0
    length = larger(tree.norm(v) if length is None else length, reach)
    return rounding_floor(tree.eps(v), size, largest, length) / size


def attainable_residual(
    recursive: float,
    v: Params,
    size: float,
    largest: float,
    reach: float = 0.0,
    length: float | None = None,
) -> float:
    """‖b − A v‖ / ‖b‖ from a recursive residual and ‖b‖ = size, no better than rounding allows.

    The recursion goes on falling after b − A v itself has stalled.
    """
    if size == 0 or recursive == 0:
        return 0.0
    return larger(recursive / size, relative_floor(v, size, largest, reach, length))


def ended(
    stopped: Stopped,
    residual: float,
    tolerance: float,
    v: Params,
    floor: float = math.inf,
    **evidence: Any,
) -> Stats:
    """The statistics of a solve, with reasons that agree: `converged` follows from `stopped`.

    A residual within the tolerance is "tolerance" however the solve came there, but for negative
    curvature; one above it that a recursion took to be within is "rounding". That counts as
    converged up to `resolved`, the residual being as good as the dtype allows, and no more than
    a hundred times `floor`, that of v alone: a start of 1e11 leaves more.
    """
    if stopped not in ("curvature", "asked"):
        if residual <= tolerance:
            stopped = "tolerance"
        elif stopped == "tolerance":
            stopped = "rounding"
    solved = stopped in ("tolerance", "asked") or (
        stopped == "rounding" and residual <= smaller(resolved(v), 100 * floor)
    )
    return Stats(residual=residual, converged=solved, stopped=stopped, **evidence)


def damped(stats: Stats, damping: float, v: Params, size: float) -> Stats:
    """The statistics of a solve of (A + damping · I) v = b, with what v leaves of A v = b; ‖b‖ = `size`."""
    left = damping * tree.norm(v) / larger(size, sys.float_info.min)  # v = 0 where b is
    return replace(stats, damping_residual=left)


def flagged(stats: Stats, reason: Stopped) -> Stats:
    """Not converged: for `reason`, or for that of the solve itself where it had not."""
    own = stats.stopped if stats.converged is False else reason
    return replace(stats, converged=False, stopped=own)


def tight_iterations(dim: int, factor: int = 20) -> int:
    """How many iterations are allowed where a method is held to its claim."""
    return min(factor * dim + 100, 20_000)
