"""Tasks beside those of one hypergradient: a whole loop, MAML, stochastic iterations.

Each has `to`, which a task whose numbers are float64 already answers with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from bilevel.rng import Streams
from bilevel.types import Params
from bilevel_problems.logistic import Logistic
from tests.benchmarks import maml
from tests.benchmarks.hold import Held
from tests.benchmarks.stochastic import Stochastic
from tests.benchmarks.tasks import TASKS as HYPERGRADIENTS
from tests.benchmarks.tasks import transformer

T = TypeVar("T")


@dataclass(frozen=True)
class Loop:
    """`steps` upper steps of `tests/benchmarks/loop.py`, in float64."""

    steps: int = 60

    def to(self, dtype: torch.dtype) -> Loop:
        return self


@dataclass(frozen=True)
class Maml:
    """One hypergradient of `tests/benchmarks/maml.py`."""

    num_tasks: int = 32
    dtype: torch.dtype = torch.float32

    def to(self, dtype: torch.dtype) -> Maml:
        return replace(self, dtype=dtype)

    def drawn(self) -> tuple[Params, Params, Params]:
        """(x, shots, queries)."""
        made = maml.problem(self.num_tasks)
        streams = Streams(0)
        x, _ = made.init(streams)
        shots, queries = next(made.episodes(streams["waves"]))
        x, shots, queries = (
            {n: v.to(self.dtype) for n, v in part.items()} for part in (x, shots, queries)
        )
        return x, shots, queries


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """A method with a part that is done once: `ready(task)` returns what is timed.

    Compilation and the start of a run are not timed; a value is that of `whole`, from the start.
    """

    ready: Callable[[T], Callable[[], Any]]
    whole: Callable[[T], Params] | None = None

    def __call__(self, task: T) -> Params:
        return self.whole(task) if self.whole else self.ready(task)()


TOY = Logistic(data="synthetic", num_features=12, spread=10.0, initial_log_penalty=-8.0)


def _iterations(method: str) -> Callable[[bool], Stochastic]:
    # a toy has a full pass of SRBA, and what comes after it
    return lambda toy=False: Stochastic(method, 3 if toy else 64)


TASKS: dict[str, Callable[..., Any]] = {
    "loop": lambda toy=False: Loop(3 if toy else 60),
    "maml": lambda toy=False: Maml(3 if toy else 32),
    **{method: _iterations(method) for method in ("soba", "saba", "srba")},
    **HYPERGRADIENTS,
    "one step": transformer,
    "products": lambda toy=False: Held(2, TOY) if toy else Held(),
}
"""Every row of the benchmark in which libraries compute the same value."""
