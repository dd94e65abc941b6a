"""What a problem measures of itself on the way of a run, and draws at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from bilevel.errors import ProblemError
from bilevel.events import Drawn, Evaluated, Event, Progress, Tabulated, Warned
from bilevel.problem.answers import require_figures, said
from bilevel.run.early_stop import watch
from bilevel.run.setup import Setup, State


def is_due(setup: Setup, state: State) -> bool:
    """Whether the problem's own measures, if it has any, are taken at the present step."""
    if "evaluate" not in setup.levels:
        return False
    if state.step == setup.upper.steps:
        return True
    if not state.step:
        return setup.evaluate_before
    every = setup.evaluate_every
    return bool(every and state.step % every == 0)


def evaluate(setup: Setup, state: State) -> Iterator[Event]:
    """The problem's own measures at the present point, if it has any."""
    measure = setup.levels.get("evaluate")
    if measure is None:
        return
    began = time.perf_counter()

    def at_step(event: Event) -> Event:
        """With the step, which a problem is not told."""
        is_dated = isinstance(event, (Tabulated, Warned))
        return replace(event, step=state.step) if is_dated else event

    found = yield from measured(setup, state, measure, at_step)
    watch(setup, state, found)
    state.evaluated = state.step
    yield Evaluated(state.step, found, time.perf_counter() - began)


def measured(
    setup: Setup,
    state: State,
    measure: Callable[..., Any],
    passed: Callable[[Event], Event | None],
) -> Generator[Event, None, dict[str, float]]:
    """What a problem's `evaluate` gives at a state, as names and numbers, which it must be.

    A generator's events are yielded as `passed` makes them, and left out where that is None. What it
    draws from a global random state is of the seed, and the same at every step.
    """
    seeded = setup.seeded("evaluate")
    with seeded:
        metrics = measure(state.x, state.y)
    if isinstance(metrics, Iterator):
        metrics = seeded.each(metrics)
    while isinstance(metrics, Iterator):
        try:
            event = passed(next(metrics))
        except StopIteration as end:
            metrics = end.value
        else:
            if event is not None:
                yield event
    if isinstance(metrics, Mapping):
        wrong = [n for n, v in metrics.items() if not (isinstance(n, str) and isinstance(v, Real))]
        if not wrong:
            return {name: v if type(v) is int else float(v) for name, v in metrics.items()}
        got = f"{wrong[0]!r}: {type(metrics[wrong[0]]).__name__}"
    else:
        got = f"a {type(metrics).__name__}"
    raise ProblemError(
        f"{type(setup.problem).__name__}.evaluate must return a dict of name: number; got {got}. A "
        "tensor of one entry is a number by .item()"
    )


def draw_figures(setup: Setup, state: State) -> Iterator[Event]:
    draw = setup.levels.get("figures") if setup.draw else None
    if draw is None:
        return
    yield Progress("figures", 0)
    with setup.seeded("figures"):
        figures = draw(state.x, state.y)
    require_figures(figures, said(setup.problem, "figures"))
    for name, figure in figures.items():
        yield Drawn(state.step, name, figure)
