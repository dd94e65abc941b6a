"""Lower steps that keep their graph: y_K as a differentiable function of x (and of y_0)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.optimizers.learned import bound as bind
from bilevel.optimizers.learned import learned, upper_entries
from bilevel.types import (
    Estimator,
    Loss,
    Losses,
    LowerSolution,
    Optimizer,
    Params,
    Path,
    Point,
)


def step(
    path: Path,
    loss: Loss,
    x: Params,
    y: Params,
    state: Any,
    batch: Any,
    *,
    evaluate: Callable[[Loss, Params, Params], Tensor] = calculus.value,
) -> tuple[Params, Any]:
    """One step of the path with its graph from (x, y, state) kept. 1 gradient."""
    loss = loss.on(batch)
    _, g = calculus.gradient_with_value(loss, x, y, evaluate)
    with torch.enable_grad():
        y, state = bound(path, loss, x, y).step(y, g, state)
        return projected(loss, y), state


def bound(path: Path, loss: Loss, x: Params, y: Params) -> Optimizer:
    """The path's optimizer with what it takes from x, which is noted to reach G's steps."""
    if not learned(path.optimizer):
        return path.optimizer
    loss.counts.reached.update(upper_entries(path.optimizer, x))
    return bind(path.optimizer, x, y)


def projected(loss: Loss, y: Params) -> Params:
    """y in the set that the lower level restricts it to, where there is one."""
    project = loss.structure.project
    return project(y) if project else y


def begin(path: Path, x: Params) -> Params:
    """y_0 with its graph: back to x where the path begins at a function of x."""
    if path.restart is None:
        return {
            name: entry if entry.requires_grad else entry.detach().requires_grad_()
            for name, entry in path.start.items()
        }
    with torch.enable_grad():
        # copies: where y_0 is x itself, ∂G/∂y must still be told from ∂G/∂x
        y = tree.map(torch.clone, path.restart(x))
    return tree.map(lambda entry: entry if entry.requires_grad else entry.requires_grad_(), y)


def pull_start(path: Path, loss: Loss, x: Params, cotangent: Params) -> Params:
    """(∂y_0/∂x)ᵀ · cotangent, in the shapes of x: zero where the start is held fixed."""
    if path.restart is None:
        return tree.zeros_like(x)
    x = tree.leaves(x)
    with torch.enable_grad():
        y = path.restart(x)
    return calculus.vjp({name: y[name] for name in cotangent}, x, cotangent, loss, upper=True)


def replay(path: Path, loss: Loss, x: Params) -> Params:
    """y_K with the graph of all its K steps back to x and y_0. K gradients, memory K graphs."""
    y = begin(path, x)
    state = path.state
    for batch in path.batches:
        y, state = step(path, loss, x, y, state, batch)
    return y


def advance(path: Path, loss: Loss, x: Params, steps: int) -> Path:
    """The path with its first `steps` steps taken at x, without a graph. `steps` gradients."""
    y, state = tree.detach(begin(path, x)), path.state
    if not steps:
        return replace(path, start=y)
    with torch.no_grad():
        optimizer = bound(path, loss, x, y)
    for batch in path.batches[:steps]:
        _, g = calculus.gradient_y(loss.on(batch), x, y)
        with torch.no_grad():
            y, state = optimizer.step(y, g, state)
            y = projected(loss, y)
    return Path(path.optimizer, y, state, path.batches[steps:])


def recorded(at: Point, name: str) -> Path:
    """The lower steps that led to a point.

    Raises:
        ProblemError: there are none.
    """
    if at.path is None:
        raise ProblemError(
            f"{name} has no lower steps to follow: of bilevel.hypergradient pass as y what "
            "bilevel.solve_lower(..., record=True) returns"
        )
    return at.path


def require_steps(path: Path | None, needed: float, name: str) -> None:
    """Raise `ProblemError` if the path lacks steps that were taken and that are to be followed."""
    if path is None or not path.dropped or needed <= len(path.batches):
        return
    kept, taken = len(path.batches), len(path.batches) + path.dropped
    asked = "all" if needed > taken else f"the last {needed:g}"
    fewer = f", or Unroll(last={kept}) for those that there are" if kept else ""
    raise ProblemError(
        f"{name} follows {asked} of the {taken} lower steps, and only the last {kept} were recorded: "
        f"its hypergradient would be that of a shorter path; call solve_lower(..., record=True){fewer}"
    )


def refuse_learned(estimator: Estimator, entries: Collection[str]) -> None:
    """Raise `ProblemError` where options of the lower steps are learned and this cannot learn them.

    `entries` are the entries of x that the steps take.
    """
    if not entries or estimator.needs.learned:
        return
    name = type(estimator).__name__
    why = (
        f"{name} differentiates the lower solution, which does not depend on how it is reached"
        if estimator.claim == "solution"
        else f"{name} does not differentiate them"
    )
    raise ProblemError(
        f"the lower steps take {', '.join(sorted(entries))} from x (a learned option of the lower "
        f"optimizer), and {why}: its hypergradient there would be a silent zero; use "
        "estimator: unroll, forward or zeroth_order, or a number in the optimizer"
    )


def recorded_from_x(at: Point, name: str) -> Path:
    """The lower steps that led to a point, where they begin at a function of x.

    Raises:
        ProblemError: there are none, or they begin elsewhere.
    """
    path = recorded(at, name)
    if path.restart is None:
        raise ProblemError(
            f"{name} learns where the lower level starts, and here that does not depend on x: "
            "give the problem lower_start(x, y), or pass solve_lower a function of x to start "
            "from and record all its steps"
        )
    return path


def along(path: Path, losses: Losses) -> Callable[[Params], Tensor]:
    """x ↦ F(x, y_K(x)), the steps of the path taken again at every x."""

    def value(x: Params) -> Tensor:
        return losses.upper(x, advance(path, losses.lower, x, len(path.batches)).start)

    return value


def with_restart(
    solution: LowerSolution, restart: Callable[[Params], Params] | None
) -> LowerSolution:
    """The solution with its path known to begin at a function of x, if it holds the first step."""
    path = solution.path
    if path is None or restart is None or len(path.batches) < solution.stats.steps:
        return solution
    return replace(solution, path=replace(path, restart=restart))
