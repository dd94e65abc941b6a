"""The start of the lower level as upper variables: it is learned beside x.

The initialisation auxiliary of IAPTT, Liu, Liu, Zeng and Zhang (2021), arXiv:2110.00455; with
`unroll` and its `pessimistic` it is the method of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.problem.answers import initial
from bilevel.problem.levels import Levels
from bilevel.problem.mapped import Maps, keep, mapped, refuse_unmapped
from bilevel.problem.protocol import Problem
from bilevel.rng import Streams
from bilevel.types import Params

START = "start"
PREFIX = f"{START}."


@dataclass(frozen=True)
class WithStart:
    """x and z, where x is a container that z has no place in, as a list or a dataclass."""

    own: Any
    start: Any


@component
class LearnedStart:
    """`problem` with y_0 = z, and z among the upper variables: `start.<name>` beside x.

    Where x or y is nested, so is what it gives: `{**x, "start": z}` beside a dict, else `WithStart`.

    For estimators that differentiate through the start: `unroll`, `forward`. z is projected as y
    is, and one step of the upper optimizer moves x and z alike. The optional methods of `problem`
    stay, with its own x.

    Raises:
        RecipeError: `problem` has a `lower_start` of its own.
        ProblemError: its x has an entry `start`, where x or y is nested.
    """

    problem: Annotated[Problem, Slot("problems")]

    @model_validator(mode="after")
    def _starts_nowhere_else(self) -> Self:
        refuse_unmapped(self, self.problem, _MAPS)
        return self

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = initial(self.problem, streams)
        return _joined(self.problem, x, tree.map_nested(_copy, y)), y

    def lower_start(self, x: Any, y: Any) -> Any:
        return start(x)

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self.problem.upper_loss(own(x), y, batch)

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self.problem.lower_loss(own(x), y, batch)

    def upper_batches(self, stream: Any) -> Iterator[Any]:
        return self.problem.upper_batches(stream)

    def lower_batches(self, stream: Any) -> Iterator[Any]:
        return self.problem.lower_batches(stream)

    def __getattr__(self, name: str) -> Any:
        # only what the problem has may be found here
        if name == "project_upper":
            return self._projection()
        if name not in _MAPS or "problem" not in vars(self):
            raise AttributeError(name)
        return mapped(self, self.problem, _MAPS, name)

    def _projection(self) -> Callable[[Params], Params]:
        """x as the problem projects it, z as it projects y."""
        levels = Levels(self.problem)
        of_x, of_y = levels.get("project_upper"), levels.get("project_lower")
        if of_x is None and of_y is None:
            raise AttributeError("project_upper")

        def project(x: Any) -> Any:
            own_x, z = own(x), start(x)
            own_x, z = of_x(own_x) if of_x else own_x, of_y(z) if of_y else z
            return _joined(self.problem, own_x, z)

        return project


def _of_own(outer: LearnedStart, method: Any) -> Any:
    """A method whose first argument is x, of the problem's own x."""
    return lambda x, *rest: method(own(x), *rest)


def _closed_form(outer: LearnedStart, method: Any) -> Any:
    """dΦ/dx; 0 in z, on which y*(x) does not depend."""

    def hypergradient(x: Any) -> Any:
        return _joined(outer.problem, method(own(x)), tree.map_nested(torch.zeros_like, start(x)))

    return hypergradient


_MAPS: Maps = {
    "prepare": keep,
    "place": keep,
    "part": keep,
    "lower_start": "it says itself where its lower level starts",
    "lower_solution": _of_own,
    "hypergradient": _closed_form,
    "evaluate": _of_own,
    "figures": _of_own,
    "export": _of_own,
    "episodes": keep,
    "project_upper": keep,  # not looked up here: `_projection` joins it with that of y
    "project_lower": keep,
    "prox_lower": _of_own,
    "lower_map": _of_own,
    "lower_constraints": _of_own,
    "lower_diagonal": _of_own,
}


def own(x: Any) -> Any:
    """The upper variables of the problem itself, without z."""
    if isinstance(x, WithStart):
        return x.own
    if _has_nested(x):
        return {name: p for name, p in x.items() if name != START}
    return {name: p for name, p in x.items() if not name.startswith(PREFIX)}


def start(x: Any) -> Any:
    """z, in the containers of y."""
    if isinstance(x, WithStart):
        return x.start
    if _has_nested(x):
        return x[START]
    return {name.removeprefix(PREFIX): p for name, p in x.items() if name.startswith(PREFIX)}


def _has_nested(x: Params) -> bool:
    return tree.is_nested(x.get(START))


def _joined(problem: Any, x: Any, z: Any) -> Any:
    """x and z in one; the inverse of `own` and `start`."""
    if tree.flat(x, "x") is x and tree.flat(z, "y") is z:
        return {**x, **{PREFIX + name: p for name, p in z.items()}}
    if type(x) is not dict:
        return WithStart(x, z)
    if START in x:
        raise ProblemError(
            f"x of {type(problem).__name__} has an entry {START!r}, which is the name of the start that is "
            "learned beside it; give it another name"
        )
    return {**x, START: z}


def _copy(entry: Tensor) -> Tensor:
    return entry.detach().clone()
