"""One upper step: lower steps, estimate, step of x."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel import calculus, tree
from bilevel.errors import ConvergenceError
from bilevel.events import Event, Sent, Stepped
from bilevel.problem import estimation
from bilevel.problem.levels import point_of
from bilevel.run import accumulation, nonfinite
from bilevel.run.agreement import require_agreement
from bilevel.run.setup import Setup, State
from bilevel.run.warnings import warn
from bilevel.sharding.again import gathering_again
from bilevel.types import (
    Estimate,
    LowerSolution,
    LowerStats,
    Moved,
    Params,
    Several,
    Stats,
    changed,
)


@dataclass(frozen=True)
class Taken:
    """What a step leads to. The next begins in plain memory: a checkpoint keeps values, not strides, and
    sums depend on their order."""

    solution: LowerSolution
    estimate: Estimate
    x: Params
    y: Params
    upper: Any
    """The state of the upper optimizer."""
    lower: Any
    estimator: Any
    value: float
    """F"""
    norm: float
    """‖dΦ/dx‖"""


Take = Callable[[Setup, State], Taken]


def advance(setup: Setup, state: State, take: Take | None = None) -> Iterator[Event]:
    """One upper step. `state` changes only once all that can fail has not.

    `take` stands in the place of `take_rounds` and `moved`, and gives the same.
    """
    began, answer, ranks = time.perf_counter(), None, setup.ranks
    sent = None if ranks.is_alone else ranks.ledger.mark()
    try:
        taken = _taken(setup, state, take)
    except ConvergenceError as error:
        answer = nonfinite.ANSWERS[setup.upper.nonfinite](setup, state, _taken, error)
        taken = answer.found
    else:
        nonfinite.note(setup, state)
    state.step += 1
    if taken is None:
        renew(state)
        yield from answer.settle(state) if answer else ()
        yield nonfinite.left_out(state, time.perf_counter() - began)
        return
    solution, estimate = taken.solution, taken.estimate
    state.x, state.y = taken.x, taken.y
    state.upper, state.lower, state.estimator = taken.upper, taken.lower, taken.estimator
    renew(state)
    stats, lower = estimate.stats, solution.stats
    state.totals = state.totals.plus(
        gradients=stats.gradients + lower.gradients,
        hvps=stats.hvps + lower.hvps,
        cross_products=stats.cross_products,
    )
    if answer:
        yield from answer.settle(state)
    yield from warn(setup, state, estimate, solution)
    state.last = Stepped(
        state.step,
        taken.value,
        lower.loss,
        taken.norm,
        lower,
        stats,
        state.totals,
        time.perf_counter() - began,
        None if sent is None else Sent(*ranks.ledger.since(sent)),
    )
    yield state.last


def _taken(setup: Setup, state: State, take: Take | None = None) -> Taken:
    """What a step from `state` leads to, agreed upon by all ranks.

    Raises:
        ConvergenceError: something in it is not finite.
        RankError: ranks disagree on it.
    """
    try:
        with gathering_again(setup.ranks):
            found = take(setup, state) if take else moved(setup, state, *take_rounds(setup, state))
    except ConvergenceError as error:
        raise ConvergenceError(f"step {state.step + 1}: {error}") from error
    require_agreement(setup.ranks, state.step + 1, found.solution, found.estimate, found.x)
    return found


def moved(setup: Setup, state: State, solution: LowerSolution, estimate: Estimate) -> Taken:
    """What an estimate leads to: the step of x. Raises `ConvergenceError` where x or y is not finite after it."""
    with torch.no_grad():
        if estimate.step is None:
            x, upper = setup.upper.step(state.x, estimate.hypergradient, state.upper, state.step)
        else:
            x, upper = tree.axpy(-estimate.step, estimate.hypergradient, state.x), state.upper
        project = setup.levels.get("project_upper")
        x = project(x) if project else x
    for level, after in (("upper", x), ("lower", solution.y)):
        if not tree.is_finite(after):
            raise ConvergenceError(
                f"the {level} step made a variable that is not finite; lower {level}.optimizer.lr"
            )
    return Taken(
        solution,
        estimate,
        tree.contiguous(x),
        tree.contiguous(solution.y),
        tree.contiguous(upper),
        tree.contiguous(solution.state),
        tree.contiguous(estimate.state, state.estimator),
        estimate.value.item(),
        tree.norm(estimate.hypergradient),
    )


def take_rounds(setup: Setup, state: State) -> tuple[LowerSolution, Estimate]:
    """The lower solve of a step and the hypergradient after it: the mean over `upper.accumulate`.

    There is one lower solve, and each hypergradient is on an upper and a lower batch of its own (with
    `lower.accumulate`, the mean over as many as a lower step takes); one that follows the lower steps
    keeps those. Where batches come in `episodes` a solve belongs to its episode, and so each
    hypergradient has one.
    """
    solution = solve_lower(setup, state)
    found = [estimate_at(setup, state, solution, next(state.upper_batches))]
    if setup.upper.accumulate == 1:
        return (after_moving(solution, found[0].moved) if found[0].moved else solution), found[0]
    solves = [solution]
    for _ in range(setup.upper.accumulate - 1):
        state = replace(state, estimator=found[-1].state)
        if "episodes" in setup.levels:
            solution = solve_again(setup, state, solution)
            solves.append(solution)
        elif not setup.estimator.needs.path:
            solution = replace(solution, batch=another(solution.batch, state.lower_batches))
        found.append(estimate_at(setup, state, solution, next(state.upper_batches)))
    return accumulation.together(solves), accumulation.mean(found)


def solve_lower(setup: Setup, state: State, *, recorded: bool = True) -> LowerSolution:
    """The lower solve of a step, with the path where the estimator needs one and `recorded`."""
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
        record=needs.path if state.x and recorded else 0,
        graph=needs.graph and recorded,
        iterates=needs.iterates if recorded else None,
    )


def solve_again(
    setup: Setup, state: State, last: LowerSolution, *, recorded: bool = True
) -> LowerSolution:
    """The lower solve of the next episode of a step, from where that of the last one ended."""
    for draws in (state.upper_batches, state.lower_batches):
        draws.next_round()
    here = replace(state, y=last.y, lower=last.state)
    return solve_lower(setup, here, recorded=recorded)


def another(batch: Any, draws: Iterator[Any]) -> Any:
    """The next lower batch, or as many as `batch` is several."""
    if isinstance(batch, Several):
        return Several(tuple(next(draws) for _ in batch.batches))
    return next(draws)


def renew(state: State) -> None:
    """A step has ended: what is drawn now is for the next."""
    for draws in (state.upper_batches, state.lower_batches):
        draws.renew()


def estimate_at(setup: Setup, state: State, solution: LowerSolution, upper_batch: Any) -> Estimate:
    draws = state.upper_batches, state.lower_batches
    losses = setup.levels.losses(upper_batch, solution.batch, draws)
    # one level only: F is watched, and descended by a method alone that moves y itself
    if not state.x and not setup.estimator.needs.moves_lower:
        with torch.no_grad():
            return Estimate({}, calculus.value(losses.upper, {}, solution.y), None, Stats())
    return estimation.estimate(
        setup.estimator, losses, point_of(state.x, solution), state.estimator
    )


def after_moving(solution: LowerSolution, moved: Moved) -> LowerSolution:
    """What the estimator did to y; its gradients are counted with the estimate."""
    stats = LowerStats(moved.steps, 0, moved.loss, moved.gradient_norm)
    return changed(solution, y=moved.y, stats=stats)
