"""How far a hypergradient is off, measured: it is asked for again where an answer must be better.

Evidence of first order does not tell what an error of y, or damping, makes of h. The same estimator is
asked once more, nearer to the lower solution or with a tenth of the damping, and what h changes by is
the error, as far as the second answer is right. Done in a first call alone, and where there is doubt.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from typing import Any

from bilevel import tree
from bilevel.calculus.products import linearize
from bilevel.linear.cg import CG
from bilevel.lower.iterate import Iterate
from bilevel.lower.proximal import Proximal
from bilevel.types import Counts, Estimate, Estimator, Loss, Losses, Params, Point, Stats, changed

NEAR = 1e-4
"""The part of ‖y‖ below which ‖∇y G‖ / curvature is no doubt of y."""

UNIT = 100
"""Multiples of eps below which y is near whatever its size: a y* of 0 is met to rounding alone."""

LARGE = 0.1
"""A residual above this leaves the step short, a change above this is told however short it is."""

STEPS = 20
"""HVPs for the step of y, or as many as the adjoint solve took."""

RESTRICTED = {"steps": 50, "relative_tolerance": 1e-5}
"""The lower solve in the place of that step where something restricts y, or it is a fixed point."""

DAMPED = 1e-3
"""The `Stats.damping_residual` below which there is no doubt of the damping."""


def remeasured(estimator: Estimator, losses: Losses, at: Point, found: Estimate) -> Estimate:
    """The estimate with `Stats.y_error` and `Stats.damping_error`, where they can be told.

    For y 1 gradient and, where that leaves a doubt, as many HVPs as it took (20 at least), and one estimate more, from the
    state of this one; for damping one more estimate. None of it is counted.
    """
    if found.stats.converged is False or found.step is not None or estimator.needs.fresh:
        return found
    counts = Counts()
    apart = Losses(replace(losses.upper, counts=counts), replace(losses.lower, counts=counts))
    errors = {}
    for name, error in (("y_error", _error_of_y), ("damping_error", _error_of_damping)):
        # a loss may refuse, by whatever it raises, a point that nobody asked for
        with contextlib.suppress(Exception):
            errors[name] = error(estimator, apart, at, found)
    return changed(found, stats=changed(found.stats, **errors))


def _error_of_y(estimator: Estimator, losses: Losses, at: Point, found: Estimate) -> float | None:
    """What h changes by, relative, where y comes nearer to the lower solution."""
    if found.stats.value_error is None:
        return None
    near = max(NEAR * tree.norm(at.y), UNIT * tree.eps(at.y))
    y, is_sure = _nearer(estimator, losses, at, found.stats, near)
    if tree.norm(tree.sub(y, at.y)) <= near:
        return None
    error, is_right = _change(estimator, losses, replace(at, y=y), found, found.state)
    # what does not converge nearer to the solution is no reason to rely on what did away from it
    return error if (is_sure and is_right) or error > LARGE else None


def _nearer(
    estimator: Any, losses: Losses, at: Point, stats: Stats, near: float
) -> tuple[Params, bool]:
    """(y nearer to the lower solution, whether all of the way that can be told); y itself where it is near."""
    structure = losses.lower.structure
    if hasattr(estimator, "nearer"):
        y = estimator.nearer(losses, at)
        return (at.y, False) if y is None else (y, True)
    if structure.restrictions or structure.map:
        return _solved(losses.lower, at)
    return _stepped(losses.lower, at, stats, near)


def _stepped(loss: Loss, at: Point, stats: Stats, near: float) -> tuple[Params, bool]:
    """(y after a step of Newton's method, whether that is all of the step); y itself where it is near."""
    lower = linearize(loss, at)
    left, curvature = tree.norm(lower.gradient), stats.curvature
    if not left or (curvature and left <= near * curvature):
        return at.y, True
    as_many = CG(iterations=max(STEPS, stats.iterations))
    solve = as_many.solve(lower.hvp_yy, lower.gradient, tree.zeros_like(at.y))
    return tree.sub(at.y, solve.solution), (solve.stats.residual or 0.0) <= LARGE


def _solved(loss: Loss, at: Point) -> tuple[Params, bool]:
    """(y after steps that heed what restricts it, whether they have come to an end)."""
    structure = loss.structure
    if structure.map:
        solver = Iterate(**RESTRICTED)
    elif structure.prox or structure.project:
        solver = Proximal(**RESTRICTED)
    else:
        return at.y, False  # constraints alone: a solve under them is no matter of a few steps
    batches = itertools.repeat(loss.one_batch)
    end = solver.solve(loss, at.x, at.y, batches=batches, state=solver.init(at.y))
    return end.y, bool(end.stats.converged)


def _error_of_damping(estimator: Any, losses: Losses, at: Point, found: Estimate) -> float | None:
    """What h changes by, relative, with a tenth of the damping."""
    damping = getattr(estimator, "damping", None)
    if (found.stats.damping_residual or 0.0) <= DAMPED or damping is None:
        return None
    less = replace(estimator, damping=damping / 10)
    error, is_sure = _change(less, losses, at, found, less.init(at))  # a state is of its damping
    return error if is_sure else None


def _change(
    estimator: Estimator, losses: Losses, at: Point, found: Estimate, state: Any
) -> tuple[float, bool]:
    """‖h − h₊‖ relative to the longer of the two, and whether h₊ is to be relied on."""
    again = estimator.estimate(losses, at, state)
    here, there = found.hypergradient, again.hypergradient
    size = max(tree.norm(here), tree.norm(there))
    off = tree.norm(tree.sub(there, here))
    error = off / size if 0 < size < math.inf else 0.0
    return error, again.stats.converged is not False and size < math.inf
