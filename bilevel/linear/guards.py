"""What every linear solver refuses, and the residual and norms that it measures, the same way in all."""

from __future__ import annotations

import math

import torch

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.types import Matvec, Params


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
