"""Losses with a part of x or y in their value and not in their gradient, which is silently another's.

`.detach()`, `.data`, `.item()`, numpy and `torch.no_grad()` leave no trace in a graph. What a loss calls
is seen while it is evaluated (`bilevel.problem.purity`); where it calls one of these, its gradient is compared with what
the loss changes by. That passes where nothing is lost (the maximum taken out of a softmax).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from bilevel import rng, tree
from bilevel.calculus.products import gradients
from bilevel.problem.second_derivatives import direction, loses_part
from bilevel.types import Counts, Loss, Losses, Params, Point

LOST = 1e-2
"""The part of a slope that has to be missing."""

BESIDE = 1e-2
"""How far from the point, relative, the slopes are looked at."""


def lost(losses: Losses, at: Point, *, second_order: bool) -> tuple[str, ...]:
    """What the gradients of two losses lack that were evaluated by `refuse_impure`, in words.

    Costs 1 gradient and 8 evaluations of a loss that may be cut, with `second_order` what
    `refuse_missing_second_derivative` does for G; nothing of any other.
    """
    found: list[str] = []
    for loss in (losses.upper, losses.lower):
        if loss.level not in losses.counts.cut:
            continue
        apart = replace(loss, counts=Counts())
        # a loss may refuse, by whatever it raises, a point beside this one
        with contextlib.suppress(Exception):
            found += _lost_slopes(apart, at)
            if not found and second_order and loss is losses.lower:
                found += _lost_bend(apart, at)
    return tuple(found)


REMEDY = (
    "(.detach(), .data, .item(), numpy, torch.no_grad(), rounding), so that the hypergradient lacks it: "
    "compute that part with torch, or pass in the batch what is meant to be held"
)


def _lost_slopes(loss: Loss, at: Point) -> Iterator[str]:
    stream = rng.stream(0, "slopes")
    # at a minimum the slope of what is cut off is 0 as well
    at = replace(at, x=_beside(at.x, stream), y=_beside(at.y, stream))
    value, at_x, at_y = gradients(loss, at)
    for name, params, gradient in (("x", at.x, at_x), ("y", at.y, at_y)):
        along = direction(params, stream)
        if along is None:
            continue
        h = tree.eps(params) ** (1 / 3) * (1 + tree.norm(params))
        wide, narrow = (_slope(loss, at, name, tree.scale(s, along), s) for s in (h, h / 2))
        expected = tree.dot(gradient, along)
        off = abs(narrow - expected)
        rounding = 100 * tree.eps(params) * abs(float(value)) / h
        if off <= max(rounding, LOST * max(abs(narrow), abs(expected))):
            continue
        if abs(wide - narrow) <= 0.1 * off:
            yield (
                f"{loss.level}_loss changes along a direction of {name} by {narrow:.3g} where its "
                f"gradient says {expected:.3g}: part of {name} reaches its value and not its gradient {REMEDY}"
            )


def _beside(params: Params, stream: torch.Generator) -> Params:
    along = direction(params, stream)
    return tree.axpy(BESIDE * (1 + tree.norm(params)), along, params) if along else params


@torch.no_grad()
def _slope(loss: Loss, at: Point, name: str, step: Params, h: float) -> float:
    """Central differences of the loss along a step of x or of y, of length h."""
    ends = (replace(at, **{name: tree.axpy(s, step, getattr(at, name))}) for s in (1.0, -1.0))
    above, below = (loss(end.x, end.y) for end in ends)
    return float(above - below) / (2 * h)


def _lost_bend(loss: Loss, at: Point) -> Iterator[str]:
    eps = max(tree.eps(at.x), tree.eps(at.y))
    if eps <= torch.finfo(torch.float32).eps and loses_part(loss, at, eps):
        yield (
            f"{loss.level}_loss loses part of its second derivative: part of x or y reaches its gradient "
            f"and not what that changes by {REMEDY}"
        )
