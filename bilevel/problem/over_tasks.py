"""Many tasks of one problem at once, batched by vmap: meta-learning with no code for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Annotated, Any, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.problem.answers import initial, require_pair, said
from bilevel.problem.mapped import Maps, keep, mapped, refuse_unmapped
from bilevel.problem.protocol import Problem
from bilevel.problem.replayed import Replayed
from bilevel.ranks import by_rows
from bilevel.rng import Streams
from bilevel.types import Params


@component
class OverTasks:
    """F = mean over tasks of F(x, yᵢ, batchᵢ),  G = sum over tasks of G(x, yᵢ, batchᵢ).

    `problem` is that of one task, and knows of no other; its `episodes` yield the (lower, upper)
    batches of one task after another. Each entry of y gains a leading dimension of `num_tasks`.
    G is a sum so that the lower steps of a task are those that it would take alone. With `fresh`
    each upper step is on new tasks; else on the first `num_tasks` throughout, each keeping its y.

    Evaluates all tasks in one call by `torch.func.vmap`; `batched` off loops over them, for losses
    that vmap cannot batch (control flow on values). From the third evaluation on the operations that
    vmap came to are replayed (`bilevel.problem.replayed`), with the same values and derivatives bit
    for bit, and found again where an attribute of `problem` changes; `not_replayed` says of which
    functions they are not, and why. `replayed` off has vmap find them each time. What restricts or starts y (`lower_start`, `project_lower`, `prox_lower`, …)
    is taken task by task too, `evaluate` is the mean over tasks, `figures` are those of the first.
    Over several ranks each computes its part of the tasks, and all have the y of all.

    Raises:
        ProblemError: a loss that vmap cannot batch; or one whose replayed values are no longer its own,
            for what changed in no attribute of `problem`.
        RecipeError: `problem` has no `episodes`, or a closed form of one task.
    """

    problem: Annotated[Problem, Slot("problems")]
    num_tasks: PositiveInt = 10
    fresh: bool = True
    batched: bool = True
    replayed: bool = True

    @model_validator(mode="after")
    def _has_tasks(self) -> Self:
        if not hasattr(self.problem, "episodes"):
            raise ValueError(
                f"{type(self.problem).__name__} has no tasks: give it `episodes(stream)`, which "
                "yields the (lower batch, upper batch) of one task after another"
            )
        refuse_unmapped(self, self.problem, _MAPS)
        return self

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = initial(self.problem, streams)
        return x, tree.map_nested(lambda p: p.expand(self.num_tasks, *p.shape).clone(), y)

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return self._each(self.problem.upper_loss, x, y, batch).mean()

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        # of some tasks, so many times their mean as there are in all
        share = batch.share if isinstance(batch, SomeTasks) else 1.0
        return self._each(self.problem.lower_loss, x, y, batch).sum() / share

    def part(self, batch: Any, rank: int, ranks: int) -> tuple[Any, float]:
        """The tasks of a rank; a loss takes their y out of that of all."""
        (own, tasks), share = by_rows((batch, torch.arange(self.num_tasks)), rank, ranks)
        return SomeTasks(own, slice(int(tasks[0]), int(tasks[-1]) + 1), share), share

    def episodes(self, stream: Any) -> Iterator[tuple[Any, Any]]:
        """The batches of `num_tasks` tasks at a time."""
        tasks: Iterator[Any] = iter(self.problem.episodes(stream))  # pyright: ignore[reportAttributeAccessIssue]
        while True:
            drawn = [next(tasks) for _ in range(self.num_tasks)]
            for task in drawn:
                require_pair(task, said(self.problem, "episodes"))
            batch = stack(drawn)
            if not self.fresh:
                yield from repeat(batch)
            yield batch

    def upper_batches(self, stream: Any) -> Iterator[Any]:
        return (upper for _, upper in self.episodes(stream))

    def lower_batches(self, stream: Any) -> Iterator[Any]:
        return (lower for lower, _ in self.episodes(stream))

    def __getattr__(self, name: str) -> Any:
        # only what the problem of one task has may be found here
        if name not in _MAPS or "problem" not in vars(self):
            raise AttributeError(name)
        return mapped(self, self.problem, _MAPS, name)

    def _each(self, function: Callable[..., Tensor], x: Params, y: Params, batch: Any) -> Tensor:
        """One value a task."""
        if isinstance(batch, SomeTasks):
            y, batch = tree.map_nested(lambda entry: entry[batch.tasks], y), batch.batch
        if not self.batched:
            return torch.stack([function(x, y_i, at(batch, i)) for i, y_i in self._tasks(y)])
        return self._map(function, (None, 0, 0), x, y, batch)

    def _map(self, function: Callable[..., Any], dims: tuple[Any, ...], *arguments: Any) -> Any:
        """`function` of one task for all at once, over those arguments that have a 0 in `dims`."""
        inputs: list[Tensor] = []
        form = dims, tuple(_spread(argument, inputs) for argument in arguments)

        def by_vmap(given: Sequence[Tensor]) -> Any:
            return self._by_vmap(function, dims, arguments, given)

        if not self.replayed:
            return by_vmap(inputs)
        return self._replayed(function.__name__, form, by_vmap, inputs)

    def _by_vmap(
        self,
        function: Callable[..., Any],
        dims: tuple[Any, ...],
        like: tuple[Any, ...],
        tensors: Sequence[Tensor],
    ) -> Any:
        """`function` of these tensors, in the containers of the arguments `like`."""

        # as lists: vmap knows neither dataclasses nor other people's mappings
        containers = []

        def one(tensors: list[Tensor]) -> list[Any]:
            given = iter(tensors)
            found = function(*(_filled(argument, given) for argument in like))
            containers.append(found)
            return [leaf for _, leaf in tree.named(found)]

        along = [dim for dim, part in zip(dims, like, strict=True) for _ in _tensors(part)]
        try:
            found = iter(torch.func.vmap(one, (along,))(list(tensors)))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ProblemError(
                f"{function.__name__} of {type(self.problem).__name__} cannot be batched over "
                f"tasks: {error}; rewrite it, or set batched=False, which loops over the tasks"
            ) from error
        return tree.map_nested(lambda _: next(found), containers[0])

    @cached_property
    def _replayed(self) -> Replayed:
        return Replayed(self.problem)

    @property
    def not_replayed(self) -> dict[str, str]:
        """Why a function is batched anew at each evaluation, by its name."""
        return dict(self._replayed.reasons)

    def _tasks(self, y: Params) -> Iterator[tuple[int, Params]]:
        return ((i, at(y, i)) for i in range(len(next(_tensors(y)))))


def _spread(value: Any, tensors: list[Tensor]) -> Any:
    """What a nested value is beside its tensors, which are added to `tensors`."""
    if type(value) is dict and all(isinstance(part, Tensor) for part in value.values()):
        tensors.extend(value.values())  # as x, y and most batches are
        return tuple(value)
    named = list(tree.named(value))
    tensors.extend(leaf for _, leaf in named if isinstance(leaf, Tensor))
    return tuple((where, None if isinstance(leaf, Tensor) else leaf) for where, leaf in named)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in tree.named(value) if isinstance(leaf, Tensor))


def _filled(like: Any, tensors: Iterator[Tensor]) -> Any:
    """`like` with its tensors replaced by the next ones."""
    return tree.map_nested(lambda leaf: next(tensors) if isinstance(leaf, Tensor) else leaf, like)


@dataclass(frozen=True)
class SomeTasks:
    """The batches of some of the tasks, those of one rank."""

    batch: Any
    tasks: slice
    share: float
    """How many they are of all."""


def _by_task(*dims: int | None) -> Callable[[OverTasks, Any], Any]:
    """A method taken task by task; `dims` has 0 for arguments that have a task dimension."""

    def lift(outer: OverTasks, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            given = tuple(
                None if argument is None else dim
                for dim, argument in zip(dims, arguments, strict=True)
            )
            return outer._map(method, given, *arguments)

        return call

    return lift


def _mean(outer: OverTasks, measure: Callable[[Params, Params], dict[str, float]]) -> Any:
    def evaluate(x: Params, y: Params) -> dict[str, float]:
        found = [measure(x, y_i) for _, y_i in outer._tasks(y)]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    return evaluate


def _of_the_first(outer: OverTasks, draw: Callable[[Params, Params], dict[str, Any]]) -> Any:
    return lambda x, y: draw(x, at(y, 0))


def replay_refusal(problem: Any) -> str | None:
    """Of a problem that is, or is made of, one over tasks: what it cannot replay, and why."""
    while problem is not None and not isinstance(problem, OverTasks):
        problem = getattr(problem, "problem", None)
    if problem is None or not problem.not_replayed:
        return None
    told = "; ".join(f"{name}: {why}" for name, why in problem.not_replayed.items())
    return (
        f"{type(problem.problem).__name__} is batched over tasks anew at each evaluation, which is as "
        f"right and takes longer, because it cannot be replayed ({told}); problem.replayed: false "
        "says that this is meant"
    )


_UNKNOWN_TASKS = "a closed form of x alone does not know which tasks are in the batch; take it out"
_MAPS: Maps = {
    "prepare": keep,
    "place": keep,
    "part": keep,  # not looked up here: it is a method of OverTasks' own
    "lower_start": _by_task(None, 0),
    "lower_solution": _UNKNOWN_TASKS,
    "hypergradient": _UNKNOWN_TASKS,
    "evaluate": _mean,
    "figures": _of_the_first,
    "export": "there is a y for each task, and no one model to write; take it out",
    "episodes": keep,  # not looked up here: it is a method of OverTasks' own
    "project_upper": keep,
    "project_lower": _by_task(0),
    "prox_lower": _by_task(None, 0, None),
    "lower_map": _by_task(None, 0, 0),
    "lower_constraints": _by_task(None, 0, 0),
    "lower_diagonal": _by_task(None, 0, 0),
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
