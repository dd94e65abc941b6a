"""A problem whose variables are nested, as the one of flat dicts that runs work with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.problem.answers import require_form, said
from bilevel.problem.mapped import Maps, keep, mapped
from bilevel.problem.tied import Ties, expanding
from bilevel.rng import Streams
from bilevel.types import Params


class NestedVariables:
    """The problem with x and y under dotted names, `layer.weight`; its methods see their containers.

    `x` and `y` are what its `init` returns. Every optional method is mapped.

    Raises:
        ProblemError: one tensor stands under two names.
    """

    def __init__(self, problem: Any, x: Any, y: Any) -> None:
        self.problem, self.x, self.y = problem, Ties(x, "x"), Ties(y, "y")
        for ties, name in ((self.x, "x"), (self.y, "y")):
            if ties.tied:
                raise ProblemError(f"{name} holds one tensor under two names; give it one name")
        both = (self.x, self.y)
        self.upper_loss = expanding(problem.upper_loss, both)
        self.lower_loss = expanding(problem.lower_loss, both)

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = self.problem.init(streams)
        return tree.flat(x, "x"), tree.flat(y, "y")

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.upper_batches(stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.problem.lower_batches(stream)

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("problem")  # none yet while it is being copied
        return mapped(self, inner, _MAPS, name)

    def _of_x(self, method: Any) -> Any:
        return lambda x: self.x.shrink(method(self.x.expand(x)))

    def _solution(self, method: Any) -> Any:
        def solution(x: Params) -> Params:
            found, who = method(self.x.expand(x)), said(self.problem, "lower_solution")
            require_form(found, self.y.expand(self._cast(x)), who, "y")
            return self.y.shrink(found)

        return solution

    def _cast(self, x: Params) -> Params:
        """y as `init` gave it, on the device and in the dtype that the run has it in, as x is."""
        entry = next(iter(x.values()), None)
        return self.y.unique if entry is None else tree.to(self.y.unique, entry.device, entry.dtype)

    def _of_y(self, method: Any) -> Any:
        return lambda y: self.y.shrink(method(self.y.expand(y)))

    def _of_both(self, method: Any) -> Any:
        """(x, y, anything) ↦ in the shapes of y."""
        return lambda x, y, *more: self.y.shrink(method(self.x.expand(x), self.y.expand(y), *more))

    def _seen(self, method: Any) -> Any:
        """(x, y, anything) ↦ anything else."""
        return lambda x, y, *more: method(self.x.expand(x), self.y.expand(y), *more)


_MAPS: Maps = {
    "prepare": keep,
    "place": keep,
    "part": keep,
    "episodes": keep,
    "lower_start": NestedVariables._of_both,
    "lower_solution": NestedVariables._solution,
    "hypergradient": NestedVariables._of_x,
    "evaluate": NestedVariables._seen,
    "figures": NestedVariables._seen,
    "export": NestedVariables._seen,
    "project_upper": NestedVariables._of_x,
    "project_lower": NestedVariables._of_y,
    "prox_lower": NestedVariables._of_both,
    "lower_map": NestedVariables._of_both,
    "lower_constraints": NestedVariables._seen,
    "lower_diagonal": NestedVariables._of_both,
}
