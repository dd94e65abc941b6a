"""The start of the lower level as upper variables: it is learned beside x.

The initialisation auxiliary of IAPTT, Liu, Liu, Zeng and Zhang (2021), arXiv:2110.00455; with
`unroll` and its `pessimistic` it is the method of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Self

from pydantic import model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.problem.protocol import Problem
from bilevel.rng import Streams
from bilevel.types import Params

PREFIX = "start."


@component
class LearnedStart:
    """`problem` with y_0 = z, and z among the upper variables: `start.<name>` beside x.

    For estimators that differentiate through the start: `unroll`, `forward`. z is projected as y
    is, and one step of the upper optimizer moves x and z alike.
    """

    problem: Annotated[Problem, Slot("problems")]

    @model_validator(mode="after")
    def _starts_nowhere_else(self) -> Self:
        if hasattr(self.problem, "lower_start"):
            kind = type(self.problem).__name__
            raise ValueError(f"{kind} says itself where its lower level starts (lower_start)")
        return self

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = self.problem.init(streams)
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
        # only what the problem has may be found here: the run asks by hasattr
        if name == "project_upper":
            return self._projection()
        if name not in (*_AS_IT_IS, *_ON_ITS_X):
            raise AttributeError(name)
        method = getattr(self.problem, name)
        return method if name in _AS_IT_IS else lambda x, *rest: method(own(x), *rest)

    def _projection(self) -> Callable[[Params], Params]:
        of_x = getattr(self.problem, "project_upper", None)
        of_y = getattr(self.problem, "project_lower", None)
        if of_x is None and of_y is None:
            raise AttributeError("project_upper")

        def project(x: Params) -> Params:
            z = {n.removeprefix(PREFIX): p for n, p in x.items() if n.startswith(PREFIX)}
            z = of_y(z) if of_y else z
            return {**(of_x(own(x)) if of_x else own(x)), **{PREFIX + n: p for n, p in z.items()}}

        return project


_AS_IT_IS = ("project_lower", "prepare", "place", "episodes")
_ON_ITS_X = ("evaluate", "figures", "lower_solution")


def own(x: Params) -> Params:
    """The upper variables of the problem itself, without z."""
    return {name: p for name, p in x.items() if not name.startswith(PREFIX)}
