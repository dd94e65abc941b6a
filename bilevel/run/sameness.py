"""Whether what a replay comes to is what the step itself comes to: the same bits, or as near as rounding takes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.replay.program import Feed
from bilevel.scalars.table import RowTable

ROUNDING_SLACK = 100
"""How much farther than by a change of its inputs in the last digit a compiler may take a result."""


def perturbed(step: Any, inputs: Any, feed: Feed, truth: Any) -> Any:
    """The step once more, from inputs that differ in the last digit: how far rounding may take its results.

    What is all but zero where a run has converged, a difference of like terms, has no digits to agree in. None
    where that step takes another way than the step itself (another number of iterations, another draw).
    """
    signs = torch.Generator().manual_seed(0)
    dtypes = {entry.dtype for level in ("x", "y") for entry in inputs[level].values()}

    def perturb(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype not in dtypes:  # a counter, for one
            return leaf
        sign = torch.randint(2, leaf.shape, generator=signs).to(leaf.device, leaf.dtype) * 2 - 1
        return leaf * (1 + torch.finfo(leaf.dtype).eps * sign)

    try:
        found = step(tree.map_nested(perturb, inputs, whole=(RowTable,)), feed.taken())
    except Exception:  # a loss that is not finite, a draw that the step itself does not make
        return None
    return found if _is_alike(found, truth) else None


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two results differ in floating numbers alone."""
    leaves, others = dict(tree.named(one)), dict(tree.named(other))
    if leaves.keys() != others.keys():
        return False
    return all(
        _is_floating(a, others[where]) or is_same(a, others[where]) for where, a in leaves.items()
    )


def _is_floating(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.is_floating_point() and a.dtype == b.dtype and a.shape == b.shape
    return isinstance(a, float) and isinstance(b, float)


def is_same(one: Any, other: Any, near: float | None = None, moved: Any = None) -> bool:
    """Whether two results are the same bits, but for what is called seconds.

    With `near`, whether floating tensors and numbers are that close, relative to the largest of a tensor, or
    as close as `ROUNDING_SLACK` times how far the other one is from `moved`, what `perturbed` gives.
    """
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one, other) or (near is not None and _is_near(one, other, near, moved))
    if not tree.is_nested(one) or not tree.is_nested(other):
        return _is_same_leaf(one, other, near, moved)
    parts, others = dict(tree.parts(one)), dict(tree.parts(other))
    if parts.keys() != others.keys():
        return False
    beside = dict(tree.parts(moved)) if tree.is_nested(moved) else {}
    return all(
        where.endswith(".seconds") or is_same(part, others[where], near, beside.get(where))
        for where, part in parts.items()
    )


def _is_same_leaf(a: Any, b: Any, near: float | None, moved: Any) -> bool:
    if bool(a == b or (a != a and b != b)):
        return True
    if near is None or not (isinstance(a, float) and isinstance(b, float)):
        return False
    away = abs(moved - b) if isinstance(moved, float) else 0.0
    allowed = near * max(abs(a), abs(b)) + ROUNDING_SLACK * away
    return math.isfinite(allowed) and abs(a - b) <= allowed


def _is_near(a: Tensor, b: Tensor, near: float, moved: Any) -> bool:
    if not a.is_floating_point():
        return False
    allowed = near * (float(b.abs().max()) if b.numel() else 0.0)
    if isinstance(moved, Tensor) and moved.shape == b.shape and b.numel():
        allowed += ROUNDING_SLACK * float((moved - b).abs().max())
    return math.isfinite(allowed) and bool(((a - b).abs() <= allowed).all())
