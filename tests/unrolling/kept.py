"""A lower solve that keeps what its estimator uses, and the estimate from it."""

from __future__ import annotations

import itertools
from dataclasses import replace

from bilevel import tree
from bilevel.estimators.unroll import Unroll
from bilevel.problem.levels import Levels, point_of
from bilevel.types import ALL_STEPS
from tests.cases import PROBLEMS, closed_form, offset

CASE = closed_form(PROBLEMS[0], 0)
LEVELS = Levels(CASE.problem)


class Boxed(type(CASE.problem)):
    """The same problem with y in a box, into which each step is projected."""

    def project_lower(self, y):
        return {name: entry.clamp(-0.5, 0.5) for name, entry in y.items()}


def solved(solver, levels=LEVELS, *, x=CASE.x, record=ALL_STEPS, graph=True, iterates=None):
    batches = itertools.repeat(CASE.lower_batch)
    start = offset(CASE.y, 1.0)
    kept = {"graph": graph, "iterates": iterates}
    return levels.solve(solver, x, start, batches=batches, record=record, **kept)


def estimate(solution, levels=LEVELS, *, x=CASE.x, estimator=None):
    losses = levels.losses(CASE.upper_batch, CASE.lower_batch)
    found = (estimator or Unroll()).estimate(losses, point_of(x, solution), {})
    return found, losses.counts


class FromX(type(CASE.problem)):
    """The same problem, each lower solve of which begins at a function of x."""

    def lower_start(self, x, y):
        total = sum(entry.sum() for entry in x.values())
        return {name: (0.1 * total).sin() + entry.detach() for name, entry in y.items()}


def elsewhere(solution):
    return solution, tree.scale(1.5, CASE.x)


def shorter(solution):
    return replace(solution, path=replace(solution.path, batches=solution.path.batches[:3])), CASE.x
