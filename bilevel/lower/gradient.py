"""First-order descent on the lower level, with the path kept if an estimator asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from bilevel import calculus, tree
from bilevel.components import Slot, component
from bilevel.lower.divergence import Growth
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import Stop
from bilevel.optimizers.differentiable import SGD
from bilevel.optimizers.learned import bound, learned, require_in_range
from bilevel.types import (
    Loss,
    LowerSolution,
    LowerStats,
    Offers,
    Optimizer,
    Params,
    Path,
    PathGraph,
)


@component
class Gradient:
    """At most `steps` steps of an optimizer, a new batch each; stops early at ‖∇y G‖ ≤ tolerance.

    Costs one lower gradient a step; with `steps` 0 y stays where it is, unevaluated. The optimizer's
    state goes on from one upper step to the next unless the problem restarts y (`lower_start`).
    Options of the optimizer that are `Learned` are those at x.

    Raises:
        ConvergenceError: G or ∇y G is not finite; or both have grown, ‖∇y G‖ a thousandfold.
        ProblemError: x has no entry for a learned option, or one out of its range.
    """

    steps: NonNegativeInt = 20
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(default_factory=SGD)
    tolerance: NonNegativeFloat = 0.0
    relative_tolerance: PositiveFloat | None = None
    """‖∇y G‖ relative to curvature times ‖y‖ (`bilevel.lower.tolerance`), where there is no
    `tolerance`: 1 gradient a solve more, for the curvature at its start."""

    @property
    def offers(self) -> Offers:
        """A path where the optimizer's steps are differentiable."""
        taken = frozenset(option.upper for option in learned(self.optimizer).values())
        supports = frozenset({"project_lower"})
        path = self.optimizer.differentiable
        return Offers(path=path, graph=path, learned=taken, supports=supports)

    @property
    def _is_relative(self) -> bool:
        return self.relative_tolerance is not None and not self.tolerance

    def init(self, y: Params) -> Any:
        state = self.optimizer.init(y)
        return {"optimizer": state, "scale": {}} if self._is_relative else state

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
    ) -> LowerSolution:
        is_relative, spent = self._is_relative, 0
        kept, state = (state["scale"], state["optimizer"]) if is_relative else ({}, state)
        # the curvature at another x and y, of another batch: looked for again
        absolute = None if is_relative else self.tolerance
        stop = Stop(absolute, self.relative_tolerance, {**kept, "curvature": 0.0}, y)
        stops = self.tolerance > 0 or is_relative
        # with early stopping the last steps are known only afterwards, so all are kept
        first = 0 if stops else max(0, self.steps - record)
        start, used, value, norm, steps = (y, state), [], float("nan"), float("nan"), 0
        graphed: _Graphed | None = None
        # without a step there still is a batch for the derivatives at y
        batch, converged = None if self.steps else next(batches), None
        growth = Growth()
        with torch.no_grad():
            require_in_range(self.optimizer, x, y)
            optimizer = bound(self.optimizer, x, y)
        for k in range(self.steps):
            batch = next(batches)
            if graph and record and k == first:
                graphed = _Graphed(x, y, state)
            with at_start(k):
                here = loss.on(batch)
                last_value, g = (
                    graphed.gradient(here) if graphed else calculus.gradient_y(here, x, y)
                )
            value, norm = float(last_value), tree.norm(g)
            if not math.isfinite(norm):
                require_finite(loss, x, y, g, k)
            growth.note(value, norm)
            if k == 0 and is_relative:
                spent = stop.begin(loss.on(batch), x, y, g)
            if stops and stop.is_met(norm, y):
                converged = True
                break
            if record and k >= first:
                start = (y, state) if k == first else start
                used.append(batch)
            if graphed:
                y, state = graphed.step(self.optimizer, loss.structure.project)
            else:
                y, state = step(optimizer, y, g, state, loss.structure.project)
            steps, converged = k + 1, False if stops else None
        growth.refuse_divergence()
        path = Path(self.optimizer, *start, tuple(used), dropped=steps - len(used))
        if graphed:
            path = replace(path, graph=graphed.of(path.batches))
        taken, stopped = steps + bool(converged) + spent, "tolerance" if converged else "iterations"
        stats = LowerStats(steps, taken, value, norm, converged, stopped=stopped)
        if is_relative:
            state = {"optimizer": state, "scale": stop.state(y)}
        return LowerSolution(y, state, stats, batch, path if record else None)


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
            y, self._state = rule.step(self._y, self._gradient, self._state)
            self._y = project(y) if project else y
        return tree.detach(self._y), tree.map_nested(Tensor.detach, self._state)

    def of(self, batches: tuple[Any, ...]) -> PathGraph:
        return PathGraph(self._given, batches, (self._x, self._start, self._y))


@torch.no_grad()
def step(
    optimizer: Optimizer,
    y: Params,
    gradient: Params,
    state: Any,
    project: Callable[[Params], Params] | None,
) -> tuple[Params, Any]:
    """One optimizer step, and the projection if there is one."""
    y, state = optimizer.step(y, gradient, state)
    return (project(y) if project else y), state
