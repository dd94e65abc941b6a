"""The control of a run: the problem's measures with x as it began and y trained as long.

What a run gains over its start is owed to two things, a better x and a trained y. Only what is
above this control is owed to x.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.events import HELD, Event, Held, Progress, Warned
from bilevel.run.evaluation import measured
from bilevel.run.setup import Setup, State, start
from bilevel.run.upper_step import (
    after_moving,
    another,
    estimate_at,
    renew,
    solve_again,
    solve_lower,
)
from bilevel.types import Params


def held(setup: Setup, step: int) -> Iterator[Event]:
    """Train y from its start with x held there, for as many lower solves as a run takes; measure.

    Its batches are those of a run that begins. Costs the lower solves of the run, of a method that
    moves y itself its estimates. One solve is taken where it is known that all others are the same:
    they begin at the same `lower_start`, on one batch (`itertools.repeat`).
    """
    measure = setup.levels.get("evaluate")
    if measure is None:
        return
    began, state = time.perf_counter(), start(setup)
    if not state.x:
        return
    # an estimator that moves y has a state of its own, which goes on from solve to solve
    is_alike = state.lower_batches.is_one_batch and not setup.estimator.needs.moves_lower
    solves, beginning = step, _beginning(setup, state) if is_alike else None
    for done in range(solves):
        yield Progress(HELD, done, solves)
        try:
            _train(setup, state)
        except ConvergenceError as error:
            if setup.upper.nonfinite == "skip":
                renew(state)
                continue
            said = f"with x as it began, lower solve {done + 1} fails: {error}"
            yield Warned(step, HELD, f"{said}. What is owed to x is not known")
            return
        if is_alike:
            last, beginning = beginning, _beginning(setup, state)
            if last is not None and _is_same(last, beginning):
                break
    yield Progress(HELD, solves, solves)

    def progress(event: Event) -> Event | None:
        """Tables and warnings are of the run's own end alone."""
        return event if isinstance(event, Progress) else None

    found = yield from measured(setup, state, measure, progress)
    yield Held(step, found, time.perf_counter() - began)


def _beginning(setup: Setup, state: State) -> Params | None:
    """Where the next lower solve begins, if not at y."""
    begin = setup.levels.restart(state.y)
    return None if begin is None else tree.detach(begin(state.x))


def _is_same(a: Params, b: Params | None) -> bool:
    return b is not None and tree.equal(a, b)


def _train(setup: Setup, state: State) -> None:
    """What one upper step does to y, with x held."""
    solution, got = solve_lower(setup, state, recorded=False), None
    if setup.estimator.needs.moves_lower:
        got = estimate_at(setup, state, solution, next(state.upper_batches))
        solution = after_moving(solution, got.moved) if got.moved else solution
    for _ in range(setup.upper.accumulate - 1):
        if "episodes" in setup.levels:
            solution = solve_again(setup, state, solution, recorded=False)
        elif not setup.estimator.needs.path:
            another(solution.batch, state.lower_batches)  # of the run's next hypergradient
    if not tree.is_finite(solution.y):
        raise ConvergenceError("it makes a variable that is not finite")
    state.y, state.lower = tree.contiguous(solution.y), tree.contiguous(solution.state)
    if got is not None:
        state.estimator = tree.contiguous(got.state, state.estimator)
    renew(state)
