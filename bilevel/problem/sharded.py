"""A problem whose variables several ranks hold together, each its rows of every entry.

Its losses and methods see wholes, made of the parts when they are called (`bilevel.sharding.parts`);
a run sees parts. It stands outermost: what it is made of is the problem over ranks (`spread`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bilevel.calculus.gauss_newton import Composed
from bilevel.problem.mapped import Maps, keep, mapped
from bilevel.rng import Streams
from bilevel.sharding.parts import Team, collected, cut, gathered
from bilevel.types import Function, Params


class Sharded:
    """`problem` with x and y in parts, of which `team` holds the whole. Every optional method is mapped.

    A loss costs one all-gather of what is in parts, and one reduce-scatter backward. `init` is that of
    the problem: every rank has the whole once, at the start.
    """

    def __init__(self, problem: Any, team: Team) -> None:
        self.problem, self.team = problem, team
        self.upper_loss = self._of_wholes(problem.upper_loss)
        self.lower_loss = self._of_wholes(problem.lower_loss)

    def init(self, streams: Streams) -> tuple[Any, Any]:
        return self.problem.init(streams)

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.upper_batches(stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.lower_batches(stream)

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("problem")  # none yet while it is being copied
        return mapped(self, inner, _MAPS, name)

    def _of_wholes(self, function: Function) -> Function:
        if isinstance(function, Composed):
            return function.through(lambda x, y: (gathered(x), gathered(y)))
        return lambda x, y, batch: function(gathered(x), gathered(y), batch)


def sharded(problem: Any, team: Team) -> Any:
    """The problem with its variables in parts, once."""
    if isinstance(problem, Sharded):
        return problem
    # of the same name, which messages begin with
    kind = type(type(problem).__name__, (Sharded,), {"__doc__": Sharded.__doc__})
    return kind(problem, team)


def _seen(outer: Sharded, method: Any) -> Any:
    """(x, y, anything) ↦ something that is no tree of x or y."""

    def call(x: Params, y: Params, *more: Any) -> Any:
        return method(collected(x), collected(y), *more)

    return call


def _measured(outer: Sharded, method: Any) -> Any:
    """What looks at x and y when a run stands still: their wholes, without a graph."""

    def call(x: Params, y: Params, *more: Any) -> Any:
        with torch.no_grad():
            wholes = collected(x), collected(y)
        return method(*wholes, *more)

    return call


def _of_both(outer: Sharded, method: Any) -> Any:
    """(x, y, anything) ↦ in the shapes of y."""

    def call(x: Params, y: Params, *more: Any) -> Params:
        return cut(method(collected(x), collected(y), *more), y)

    return call


def _of_one(outer: Sharded, method: Any) -> Any:
    """x ↦ in the shapes of x, or y ↦ in those of y."""
    return lambda params: cut(method(collected(params)), params)


_MAPS: Maps = {
    "prepare": keep,
    "place": keep,
    "part": keep,
    "episodes": keep,
    "lower_start": _of_both,
    "lower_solution": "it is asked for in a process by itself (bilevel check)",
    "hypergradient": _of_one,
    "evaluate": _measured,
    "figures": _measured,
    "export": _measured,
    "project_upper": _of_one,
    "project_lower": _of_one,
    "prox_lower": _of_both,
    "lower_map": _of_both,
    "lower_constraints": _seen,
    "lower_diagonal": _of_both,
}
