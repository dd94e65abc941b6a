"""Whether what a problem gives as its lower solution is one, before others are judged by it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bilevel import calculus, tree
from bilevel.calculus.fixed_point_maps import backward_of
from bilevel.errors import ProblemError
from bilevel.lower.tolerance import curvature_along
from bilevel.problem.answers import said
from bilevel.problem.levels import Levels
from bilevel.types import Counts, Loss, Params

CLOSE = 1e-6
"""Of the size of y: how far a step of Newton's length may lead from what counts as the lower solution."""


def require_solution(levels: Levels, lower: Loss, x: Params, y: Params, start: Params) -> None:
    """Raise `ProblemError` where y, the problem's own `lower_solution` at x, is not one.

    A step down ∇y G of the length ‖∇y G‖ / curvature must lead less than `CLOSE` away, relative to
    the larger of y and `start`; after it comes the projection or the proximal map, where there is one.
    With neither, G must fall along that step for y to be refused: at a kink it does not. Not looked at
    where `lower_constraints` alone restrict y. 3 gradients and 2 losses, which are not counted.
    """
    structure = lower.structure
    if structure.constraints and not (structure.prox or structure.project):
        return
    lower = replace(lower, counts=Counts())
    _, g = calculus.gradient_y(lower, x, y)
    slope = tree.norm(g)
    if slope == 0 and not structure.restrictions:
        return
    size = max(tree.norm(y), tree.norm(start)) or 1.0
    curvature = curvature_along(lower, x, y, g)
    lr = 1 / curvature if curvature else (size / slope if slope else 1.0)
    moved = tree.axpy(-lr, g, y)
    with torch.no_grad():
        backward = backward_of(lower, lr)
        after = backward(x, moved) if backward else moved
        off = tree.norm(tree.sub(after, y))
        if off <= max(CLOSE, math.sqrt(tree.eps(y))) * size:
            return
        if backward is None and not lower(x, after) < lower(x, y):
            return
    began = tree.norm(calculus.gradient_y(lower, x, start)[1])
    far = f"‖∇y G‖ = {slope:.2g} there, and {began:.2g} where the lower level starts"
    if backward:
        far += (
            f"; a {'proximal' if structure.prox else 'projected'} step from it leads {off:.2g} away"
        )
    of = "" if lower.batch is None else ", on the lower batch that was drawn"
    raise ProblemError(
        f"{said(levels.problem, 'lower_solution')} is not a solution: {far}{of}. Correct it, or take it "
        "out, and the lower level is solved numerically"
    )
