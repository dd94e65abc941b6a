"""Many tasks of one problem at once, batched by vmap: meta-learning with no code for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Annotated, Any, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.problem.protocol import Problem
from bilevel.rng import Streams
from bilevel.types import Params


@component
class OverTasks:
    """F = mean over tasks of F(x, yᵢ, batchᵢ),  G = sum over tasks of G(x, yᵢ, batchᵢ).

    `problem` is that of one task, and knows of no other; its `episodes` yield the (lower, upper)
    batches of one task after another. Each entry of y gains a leading dimension of `num_tasks`.
    G is a sum so that the lower steps of a task are those that it would take alone. With `fresh`
    each upper step is on new tasks; else on the first `num_tasks` for ever, each keeping its y.

    Evaluates all tasks in one call by `torch.func.vmap`; `batched` off loops over them, for losses
    that vmap cannot batch (control flow on values). `lower_start` and `project_lower` are taken
    task by task, `evaluate` is the mean over tasks.

    Raises:
        ProblemError: a loss that vmap cannot batch.
    """

    problem: Annotated[Problem, Slot("problems")]
    num_tasks: PositiveInt = 10
    fresh: bool = True
    batched: bool = True

    @model_validator(mode="after")
    def _has_tasks(self) -> Self:
        if not hasattr(self.problem, "episodes"):
            raise ValueError(
                f"{type(self.problem).__name__} has no tasks: give it `episodes(stream)`, which "
                "yields the (lower batch, upper batch) of one task after another"
            )
        return self

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = self.problem.init(streams)
        return x, tree.map(lambda p: p.expand(self.num_tasks, *p.shape).clone(), y)

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self._each(self.problem.upper_loss, x, y, batch).mean()

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self._each(self.problem.lower_loss, x, y, batch).sum()

    def episodes(self, stream: Any) -> Iterator[tuple[Any, Any]]:
        """The batches of `num_tasks` tasks at a time."""
        tasks: Iterator[Any] = iter(self.problem.episodes(stream))  # pyright: ignore[reportAttributeAccessIssue]
        while True:
            batch = stack([next(tasks) for _ in range(self.num_tasks)])
            if not self.fresh:
                yield from repeat(batch)
            yield batch

    def upper_batches(self, stream: Any) -> Iterator[Any]:
        return (upper for _, upper in self.episodes(stream))

    def lower_batches(self, stream: Any) -> Iterator[Any]:
        return (lower for lower, _ in self.episodes(stream))

    def __getattr__(self, name: str) -> Any:
        # only what the problem of one task has may be found here: the run asks by hasattr
        if name not in _LIFTED or "problem" not in vars(self):
            raise AttributeError(name)
        return _LIFTED[name](self, getattr(self.problem, name))

    def _each(self, function: Callable[..., Tensor], x: Params, y: Params, batch: Any) -> Tensor:
        """One value a task."""
        if not self.batched:
            return torch.stack([function(x, y_i, at(batch, i)) for i, y_i in self._tasks(y)])
        # as a list: vmap knows neither dataclasses nor other people's mappings
        leaves = [leaf for _, leaf in tree.named(batch) if isinstance(leaf, Tensor)]

        @functools.wraps(function)
        def one(x: Params, y: Params, leaves: list[Tensor]) -> Tensor:
            given = iter(leaves)
            whole = tree.map_nested(
                lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, batch
            )
            return function(x, y, whole)

        return self._map(one, (None, 0, 0 if leaves else None), x, y, leaves)

    def _map(self, function: Callable[..., Any], dims: tuple[Any, ...], *arguments: Any) -> Any:
        try:
            return torch.func.vmap(function, dims)(*arguments)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            name = getattr(function, "__name__", "a function")
            raise ProblemError(
                f"{name} of {type(self.problem).__name__} cannot be batched over tasks: {error}; "
                "rewrite it, or set batched=False, which loops over the tasks"
            ) from error

    def _tasks(self, y: Params) -> Iterator[tuple[int, Params]]:
        return ((i, at(y, i)) for i in range(self.num_tasks))

    def _lift_start(self, start: Callable[[Params, Params], Params]) -> Any:
        return lambda x, y: self._map(start, (None, 0), x, y)

    def _lift_projection(self, project: Callable[[Params], Params]) -> Any:
        return lambda y: self._map(project, (0,), y)

    def _lift_measure(self, measure: Callable[[Params, Params], dict[str, float]]) -> Any:
        def evaluate(x: Params, y: Params) -> dict[str, float]:
            found = [measure(x, y_i) for _, y_i in self._tasks(y)]
            return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

        return evaluate

    def _keep(self, method: Any) -> Any:
        return method


_LIFTED: dict[str, Callable[[OverTasks, Any], Any]] = {
    "lower_start": OverTasks._lift_start,
    "project_lower": OverTasks._lift_projection,
    "evaluate": OverTasks._lift_measure,
    "project_upper": OverTasks._keep,
    "prepare": OverTasks._keep,
    "place": OverTasks._keep,
}


def stack(items: list[Any]) -> Any:
    """Batches of the same structure as one, with a leading dimension; None stays None."""
    return tree.map_nested(_stacked, *items)


def _stacked(first: Any, *others: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.stack([first, *others])
    if first is None:
        return None
    raise ProblemError(
        f"the batch of a task holds {type(first).__name__}; tasks are batched, so it must be "
        "tensors in dicts, lists, tuples or dataclasses"
    )


def at(batch: Any, index: int) -> Any:
    """The part of one task in a batch that `stack` made."""
    return tree.map_nested(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, batch)
