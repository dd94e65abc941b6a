"""One upper step: lower steps, estimate, step of x."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bilevel import calculus, tree
from bilevel.errors import ConvergenceError
from bilevel.events import Event, Stepped
from bilevel.problem import estimation
from bilevel.problem.levels import point_of
from bilevel.run.setup import Setup, State
from bilevel.run.warnings import warn
from bilevel.types import Estimate, LowerSolution, LowerStats, Moved, Stats


def advance(setup: Setup, state: State) -> Iterator[Event]:
    """One upper step. `state` changes only once all that can fail has not."""
    began = time.perf_counter()
    try:
        solution = solve_lower(setup, state)
        upper_batch = next(state.upper_batches)
        estimate = estimate_at(setup, state, solution, upper_batch)
    except ConvergenceError as error:
        raise ConvergenceError(f"step {state.step + 1}: {error}") from error
    if estimate.moved:
        solution = after_moving(solution, estimate.moved)
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
    )


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
    return replace(solution, y=moved.y, stats=stats)
