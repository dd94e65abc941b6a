"""First-order descent on the lower level, with the path kept if an estimator asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import calculus, tree
from bilevel.components import Slot, component
from bilevel.errors import ConvergenceError
from bilevel.lower.divergence import Growth
from bilevel.lower.start import blaming_the_start, require_finite
from bilevel.lower.tolerance import Stop
from bilevel.optimizers.adjusted import Adjusted
from bilevel.optimizers.clip import Clip
from bilevel.optimizers.differentiable import SGD
from bilevel.optimizers.learned import bound, learned, require_in_range
from bilevel.optimizers.schedule import Schedule
from bilevel.optimizers.stepped import stepped
from bilevel.types import (
    Iterates,
    Loss,
    LowerSolution,
    LowerStats,
    Offers,
    Optimizer,
    Params,
    Path,
    PathGraph,
    PathIterates,
    Several,
)


@component
class Gradient:
    """At most `steps` steps of an optimizer, a new batch each; stops early at ‖∇y G‖ ≤ tolerance.

    Costs `accumulate` lower gradients a step; with `steps` 0 y stays where it is, and they are taken
    there, for G and ‖∇y G‖. The optimizer's state, and where it is in its schedule, go on from one upper step to the next unless
    the problem restarts y (`lower_start`). Options of the optimizer that are `Learned` are those at x.
    Unrolling differentiates the steps as they are taken: clipped, scheduled, of mean gradients.

    Raises:
        ConvergenceError: G or ∇y G is not finite; or both have grown, ‖∇y G‖ a thousandfold.
        ProblemError: x has no entry for a learned option, or one out of its range; or the schedule
            has no rate for a step.
    """

    steps: NonNegativeInt = 20
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    tolerance: NonNegativeFloat = 0.0
    relative_tolerance: PositiveFloat | None = None
    """‖∇y G‖ relative to curvature times ‖y‖ (`bilevel.lower.tolerance`), where there is no
    `tolerance`: 1 gradient a solve more, for the curvature at its start."""
    schedule: Schedule | None = None
    """The learning rate of each lower step; that of the optimizer throughout where there is none."""
    schedule_over: Literal["run", "solve"] = "run"
    """Whether the steps of a schedule are counted through the run, or again from each upper step on."""
    clip: Clip | None = None
    """What of ∇y G reaches the optimizer. ‖∇y G‖ is reported, and stops the solve, as it was."""
    accumulate: PositiveInt = 1
    """Batches that a step takes the mean of G over."""
    nonfinite: Literal["halt", "skip"] = "halt"
    """What a G or ∇y G that is not finite does: end the run, or leave that lower step out."""

    @property
    def rule(self) -> Optimizer:
        """The optimizer with what is done to its gradient and its rate."""
        if self.clip is None and self.schedule is None:
            return self.optimizer
        # the protocol has a class variable where the answer is that of what is wrapped
        return cast("Optimizer", Adjusted(self.optimizer, self.clip, self.schedule))

    @property
    def offers(self) -> Offers:
        """A path where the optimizer's steps are differentiable."""
        taken = frozenset(option.upper for option in learned(self.optimizer).values())
        supports = frozenset({"project_lower"})
        path = self.optimizer.differentiable
        return Offers(path=path, graph=path, iterates=path, learned=taken, supports=supports)

    @property
    def _is_relative(self) -> bool:
        return self.relative_tolerance is not None and not self.tolerance

    def init(self, y: Params) -> Any:
        state = self.begin(self.rule.init(y))
        return {"optimizer": state, "scale": {}} if self._is_relative else state

    def begin(self, state: Any) -> Any:
        """The state of `rule` as the steps of a solve begin."""
        if self.schedule is None:
            return state
        rule = Adjusted(self.optimizer, self.clip, self.schedule)
        return rule.ahead(state, self.steps, again=self.schedule_over == "solve")

    def draw(self, batches: Iterator[Any]) -> Any:
        """The batch of one step."""
        if self.accumulate == 1:
            return next(batches)
        return Several(tuple(next(batches) for _ in range(self.accumulate)))

    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
        graph: bool = False,
        iterates: Iterates | None = None,
    ) -> LowerSolution:
        is_relative, spent, rule = self._is_relative, 0, self.rule
        kept, state = (state["scale"], state["optimizer"]) if is_relative else ({}, state)
        state = self.begin(state)
        # the curvature at another x and y, of another batch: looked for again
        absolute = None if is_relative else self.tolerance
        stop = Stop(absolute, self.relative_tolerance, {**kept, "curvature": 0.0}, y)
        stops, skips = self.tolerance > 0 or is_relative, self.nonfinite == "skip"
        # where steps may end early or be left out the last are known only afterwards: all are kept
        first = 0 if stops or skips else max(0, self.steps - record)
        start, used, value, norm, steps = (y, state), [], float("nan"), float("nan"), 0
        graphed: _Graphed | None = None
        passed, every = {}, _every(iterates, int(self.steps - first))
        # without a step there still is a batch for the derivatives at y
        batch, converged = None if self.steps else self.draw(batches), None
        growth, failed, skipped = Growth(), None, 0
        with torch.no_grad():
            require_in_range(rule, x, y)
            optimizer = bound(rule, x, y)
        for k in range(self.steps):
            drawn = self.draw(batches)
            if graph and record and k == first:
                graphed = _Graphed(x, y, state)
            here = loss.on(drawn)
            try:
                last_value, g, last_norm = _look(here, x, y, k, graphed)
            except ConvergenceError as error:
                if not skips:
                    raise
                failed, skipped = error, skipped + 1
                continue
            value, norm, batch = last_value.item(), last_norm, drawn
            growth.note(value, norm)
            if steps == 0 and is_relative:
                spent = stop.begin(here, x, y, g)
            if stops and stop.is_met(norm, y):
                converged = True
                break
            if record and k >= first:
                start = start if used else (y, state)
                if every and len(used) % every == 0:
                    passed[len(used)] = y, state
                used.append(batch)
            if graphed:
                y, state = graphed.step(rule, loss.structure.project)
            else:
                y, state = step(optimizer, y, g, state, loss.structure.project)
            steps, converged = steps + 1, False if stops else None
        if failed and skipped == self.steps:
            raise failed
        if not self.steps:
            here = loss.on(batch)
            last_value, g, norm = _look(here, x, y, 0, None)
            value = last_value.item()
            spent = stop.begin(here, x, y, g) if is_relative else 0
            converged = stop.is_met(norm, y) if stops else None
        growth.refuse_divergence()
        path = Path(rule, *start, tuple(used), dropped=steps - len(used))
        if graphed:
            path = replace(path, graph=graphed.of(path.batches))
        if every:
            passed[len(used)] = y, state
            path = replace(path, iterates=PathIterates(x, path.batches, passed))
        looked = steps + bool(converged) + skipped if self.steps else 1
        taken = (looked + spent) * self.accumulate
        stopped = "tolerance" if converged else "iterations"
        stats = LowerStats(steps, taken, value, norm, converged, stopped=stopped, skipped=skipped)
        if is_relative:
            state = {"optimizer": state, "scale": stop.state(y)}
        return LowerSolution(y, state, stats, batch, path if record else None)


def _every(iterates: Iterates | None, steps: int) -> int:
    """Of how many steps one iterate is kept; 0 where none is."""
    if iterates is None:
        return 0
    return 1 if iterates == "each" else math.isqrt(max(steps - 1, 0)) + 1


def _look(
    loss: Loss, x: Params, y: Params, k: int, graphed: _Graphed | None
) -> tuple[Tensor, Params, float]:
    """(G, ∇y G, its norm) before step k + 1. Raises `ConvergenceError` where one is not finite."""
    try:
        value, g = graphed.gradient(loss) if graphed else calculus.gradient_y(loss, x, y)
    except ConvergenceError as error:
        if k:
            raise
        raise blaming_the_start(error) from error
    norm = tree.norm(g)
    if not norm < math.inf:
        require_finite(loss, x, y, g, k)
    return value, g, norm


class _Graphed:
    """Steps taken with their graph, back to leaves of x and of the y that they begin at."""

    def __init__(self, x: Params, y: Params, state: Any) -> None:
        self._given, self._state = x, state
        self._x = tree.leaves(x)
        self._y = self._start = tree.leaves(y)
        self._gradient: Params = {}

    def gradient(self, loss: Loss) -> tuple[Tensor, Params]:
        """(value, ∇y G) where the steps have come to, detached. 1 gradient."""
        value, self._gradient = calculus.gradient_with_value(loss, self._x, self._y)
        return value.detach(), tree.detach(self._gradient)

    def step(
        self, optimizer: Optimizer, project: Callable[[Params], Params] | None
    ) -> tuple[Params, Any]:
        """One step along the gradient that was asked for last: y and the state, detached."""
        with torch.enable_grad():
            rule = bound(optimizer, self._x, self._y)
            y, self._state = stepped(rule, self._y, self._gradient, self._state)
            self._y = project(y) if project else y
        return tree.detach(self._y), tree.map_nested(Tensor.detach, self._state)

    def of(self, batches: tuple[Any, ...]) -> PathGraph:
        return PathGraph(self._given, batches, (self._x, self._start, self._y))


def step(
    optimizer: Optimizer,
    y: Params,
    gradient: Params,
    state: Any,
    project: Callable[[Params], Params] | None,
) -> tuple[Params, Any]:
    """One optimizer step, and the projection if there is one."""
    with torch.no_grad():
        y, state = stepped(optimizer, y, gradient, state)
        return (project(y) if project else y), state
