"""The start of the lower level as upper variables: it is learned beside x.

The initialisation auxiliary of IAPTT, Liu, Liu, Zeng and Zhang (2021), arXiv:2110.00455; with
`unroll` and its `pessimistic` it is the method of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.problem.answers import initial
from bilevel.problem.levels import Levels
from bilevel.problem.mapped import Maps, keep, mapped, refuse_unmapped
from bilevel.problem.protocol import Problem
from bilevel.rng import Streams
from bilevel.types import Params

PREFIX = "start."


@component
class LearnedStart:
    """`problem` with y_0 = z, and z among the upper variables: `start.<name>` beside x.

    For estimators that differentiate through the start: `unroll`, `forward`. z is projected as y
    is, and one step of the upper optimizer moves x and z alike. The optional methods of `problem`
    stay, with its own x.

    Raises:
        RecipeError: `problem` has a `lower_start` of its own.
    """

    problem: Annotated[Problem, Slot("problems")]

    @model_validator(mode="after")
    def _starts_nowhere_else(self) -> Self:
        refuse_unmapped(self, self.problem, _MAPS)
        return self

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = initial(self.problem, streams)
        return {**x, **{PREFIX + name: p for name, p in tree.clone(y).items()}}, y

    def lower_start(self, x: Params, y: Params) -> Params:
        return {name: x[PREFIX + name] for name in y}

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

        def project(x: Params) -> Params:
            z = {n.removeprefix(PREFIX): p for n, p in x.items() if n.startswith(PREFIX)}
            z = of_y(z) if of_y else z
            return {**(of_x(own(x)) if of_x else own(x)), **{PREFIX + n: p for n, p in z.items()}}

        return project


def _of_own(outer: LearnedStart, method: Any) -> Any:
    """A method whose first argument is x, of the problem's own x."""
    return lambda x, *rest: method(own(x), *rest)


def _closed_form(outer: LearnedStart, method: Any) -> Any:
    """dΦ/dx; 0 in z, on which y*(x) does not depend."""

    def hypergradient(x: Params) -> Params:
        found = method(own(x))
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in x.items()}

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


def own(x: Params) -> Params:
    """The upper variables of the problem itself, without z."""
    return {name: p for name, p in x.items() if not name.startswith(PREFIX)}
