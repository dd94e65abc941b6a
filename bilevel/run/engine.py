"""The run: lower steps, estimate, upper step, as a generator of events.

While the generator is suspended its state is still, so whoever drives it may save the state after
any event, and a test is `list(run(setup, state))`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from numbers import Real
from typing import Any

import torch

from bilevel import calculus, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.events import (
    Drawn,
    Evaluated,
    Event,
    Finished,
    Progress,
    Started,
    Stepped,
    Tabulated,
    Warned,
)
from bilevel.problem import estimation
from bilevel.problem.levels import point_of
from bilevel.run.refusals import caution, refuse_mismatch
from bilevel.run.setup import Setup, State, restore, start
from bilevel.run.warnings import warn
from bilevel.types import Estimate, LowerSolution, LowerStats, Moved, Stats

__all__ = [
    "Setup",
    "State",
    "evaluate",
    "is_due",
    "prepare",
    "refuse_mismatch",
    "restore",
    "run",
    "start",
]


def prepare(setup: Setup) -> Iterator[Event]:
    """Refuse what cannot work, then let the problem do its slow work, then place it."""
    refuse_mismatch(setup)
    work = setup.levels.get("prepare")
    if work:
        yield from work(setup.device) if signature(work).parameters else work()
    place = setup.levels.get("place")
    if place:
        told = place(setup.device, setup.dtype)
        yield from told if isinstance(told, list) else ()


def run(setup: Setup, state: State) -> Iterator[Event]:
    """Take the upper steps that are left, from `state`, which is advanced in place.

    Raises:
        ConvergenceError: a loss or a hypergradient is not finite; the message names the step, and
            the state is that of the last good step.

    Whatever is raised, `state.rewind()` makes of `state` what `State.save` may save: the run resumed
    from it takes the step that failed, or the measures, again.
    """
    began, steps = time.perf_counter(), setup.upper.steps
    yield Started(
        state.step,
        steps,
        setup.name,
        tree.size(state.x),
        tree.size(state.y),
        str(setup.device),
        str(setup.dtype).removeprefix("torch."),
    )
    yield from caution(setup, state)
    if state.step != state.evaluated and is_due(setup, state):  # not so after most resumptions
        yield from evaluate(setup, state)
    while state.step < steps:
        yield from _advance(setup, state)
        if is_due(setup, state):
            yield from evaluate(setup, state)
    yield from _draw(setup, state)
    yield Finished(state.step, "done", time.perf_counter() - began, dict(state.warned))


def is_due(setup: Setup, state: State) -> bool:
    """Whether the problem's own measures, if it has any, are taken at the present step."""
    if "evaluate" not in setup.levels:
        return False
    every = setup.evaluate_every
    return state.step in (0, setup.upper.steps) or bool(every and state.step % every == 0)


def evaluate(setup: Setup, state: State) -> Iterator[Event]:
    """The problem's own measures at the present point, if it has any."""
    measure = setup.levels.get("evaluate")
    if measure is None:
        return
    began = time.perf_counter()
    metrics = measure(state.x, state.y)
    if isinstance(metrics, Iterator):
        metrics = yield from _at(state.step, metrics)
    found = _measures(setup, metrics)
    state.evaluated = state.step
    yield Evaluated(state.step, found, time.perf_counter() - began)


def _measures(setup: Setup, metrics: Any) -> dict[str, float]:
    """What a problem measured, which must be names and numbers."""
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


def _at(step: int, work: Iterator[Event]) -> Generator[Event, None, Any]:
    """What a problem yields while it measures, with the step, which it is not told."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        yield replace(event, step=step) if isinstance(event, (Tabulated, Warned)) else event


def _draw(setup: Setup, state: State) -> Iterator[Event]:
    draw = setup.levels.get("figures")
    if draw is None:
        return
    yield Progress("figures", 0)
    for name, figure in draw(state.x, state.y).items():
        yield Drawn(state.step, name, figure)


def _advance(setup: Setup, state: State) -> Iterator[Event]:
    """One upper step. `state` changes only once all that can fail has not."""
    began = time.perf_counter()
    try:
        solution = _solve_lower(setup, state)
        upper_batch = next(state.upper_batches)
        estimate = _estimate(setup, state, solution, upper_batch)
    except ConvergenceError as error:
        raise ConvergenceError(f"step {state.step + 1}: {error}") from error
    if estimate.moved:
        solution = _moved(solution, estimate.moved)
    with torch.no_grad():
        if estimate.step is None:
            x, upper = setup.upper.optimizer.step(state.x, estimate.hypergradient, state.upper)
        else:
            x, upper = tree.axpy(-estimate.step, estimate.hypergradient, state.x), state.upper
        project = setup.levels.get("project_upper")
        x = project(x) if project else x
    for level, after in (("upper", x), ("lower", solution.y)):
        if not tree.is_finite(after):
            raise ConvergenceError(
                f"step {state.step + 1}: the {level} step made a variable that is not finite; "
                f"lower {level}.optimizer.lr"
            )
    value, norm = float(estimate.value), tree.norm(estimate.hypergradient)
    # plain memory: a checkpoint keeps values, not strides, and sums depend on their order
    state.x, state.y, state.upper, state.lower, state.estimator = (
        tree.contiguous(part) for part in (x, solution.y, upper, solution.state, estimate.state)
    )
    state.step += 1
    for draws in (state.upper_batches, state.lower_batches):
        draws.renew()
    stats, lower = estimate.stats, solution.stats
    state.totals = state.totals.plus(
        gradients=stats.gradients + lower.gradients,
        hvps=stats.hvps + lower.hvps,
        cross_products=stats.cross_products,
    )
    yield from warn(setup, state, estimate, solution)
    yield Stepped(
        state.step,
        value,
        lower.loss,
        norm,
        lower,
        stats,
        state.totals,
        time.perf_counter() - began,
    )


def _solve_lower(setup: Setup, state: State) -> LowerSolution:
    needs = setup.estimator.needs
    if needs.moves_lower:
        return setup.levels.unsolved(
            setup.lower, state.x, state.y, batches=state.lower_batches, state=state.lower
        )
    return setup.levels.solve(
        setup.lower,
        state.x,
        state.y,
        batches=state.lower_batches,
        state=state.lower,
        record=needs.path if state.x else 0,
        graph=needs.graph,
    )


def _estimate(setup: Setup, state: State, solution: LowerSolution, upper_batch: Any) -> Estimate:
    draws = state.upper_batches, state.lower_batches
    losses = setup.levels.losses(upper_batch, solution.batch, draws)
    # one level only: F is watched, and descended by a method alone that moves y itself
    if not state.x and not setup.estimator.needs.moves_lower:
        with torch.no_grad():
            return Estimate({}, calculus.value(losses.upper, {}, solution.y), None, Stats())
    return estimation.estimate(
        setup.estimator, losses, point_of(state.x, solution), state.estimator
    )


def _moved(solution: LowerSolution, moved: Moved) -> LowerSolution:
    """What the estimator did to y; its gradients are counted with the estimate."""
    stats = LowerStats(moved.steps, 0, moved.loss, moved.gradient_norm)
    return replace(solution, y=moved.y, stats=stats)
