"""The control of a run: the problem's measures with x as it began and y trained as long.

What a run gains over its start is owed to two things, a better x and a trained y. Only what is
above this control is owed to x.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import torch

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.events import Event, Held, Progress, Warned
from bilevel.run.evaluation import measures
from bilevel.run.setup import Setup, State, start
from bilevel.run.upper_step import after_moving, estimate_at, solve_lower
from bilevel.types import Params

STAGE = "x held"


def held(setup: Setup, step: int) -> Iterator[Event]:
    """Train y from its start with x held there, for as many lower solves as a run takes; measure.

    Its batches are those of a run that begins. Where each solve begins at the same `lower_start`,
    one is taken. Costs the lower solves of the run, of a method that moves y itself its estimates.
    """
    measure = setup.levels.get("evaluate")
    if measure is None:
        return
    began, state = time.perf_counter(), start(setup)
    if not state.x:
        return
    x, solves = state.x, setup.upper.steps
    for done in range(solves):
        yield Progress(STAGE, done, solves)
        try:
            before = _beginning(setup, state)
            _train(setup, state)
        except ConvergenceError as error:
            said = f"with x as it began, lower solve {done + 1} fails: {error}"
            yield Warned(step, STAGE, f"{said}. What is owed to x is not known")
            return
        if before is not None and _is_same(before, _beginning(setup, state)):
            break
    yield Progress(STAGE, solves, solves)
    metrics = measure(x, state.y)
    if isinstance(metrics, Iterator):
        metrics = yield from _progress(metrics)
    yield Held(step, measures(setup, metrics), time.perf_counter() - began)


def _beginning(setup: Setup, state: State) -> Params | None:
    """Where the next lower solve begins, if not at y."""
    begin = setup.levels.restart(state.y)
    return None if begin is None else tree.detach(begin(state.x))


def _is_same(a: Params, b: Params | None) -> bool:
    return b is not None and all(torch.equal(value, b[name]) for name, value in a.items())


def _train(setup: Setup, state: State) -> None:
    """What one upper step does to y, with x held."""
    solution = solve_lower(setup, state, recorded=False)
    if setup.estimator.needs.moves_lower:
        got = estimate_at(setup, state, solution, next(state.upper_batches))
        state.estimator = got.state
        solution = after_moving(solution, got.moved) if got.moved else solution
    if not tree.is_finite(solution.y):
        raise ConvergenceError("it makes a variable that is not finite")
    state.y, state.lower = tree.contiguous(solution.y), tree.contiguous(solution.state)
    for draws in (state.upper_batches, state.lower_batches):
        draws.renew()


def _progress(work: Iterator[Event]) -> Generator[Event, None, Any]:
    """The measures; tables and warnings are of the run's own end alone."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        if isinstance(event, Progress):
            yield event
