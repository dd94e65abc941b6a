"""What each step says besides its losses, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

from bilevel.events import Started, Stepped
from bilevel.sinks.numbers import COUNTS, counts, duration, relative_error, small


@dataclass(frozen=True)
class Column:
    """A head, its width, and what stands below it; None where the step has nothing to say."""

    head: str
    width: int
    of: Callable[[Stepped], str | None]


def _residual(event: Stepped) -> str | None:
    value = event.estimate.residual
    return None if value is None else small(value)


def _condition(event: Stepped) -> str | None:
    """Of an indefinite matrix it means nothing: the curvature that tells so stands in its place."""
    stats = event.estimate
    if stats.curvature is not None and stats.curvature <= 0:
        return "curv≤0"
    return None if stats.condition is None else small(stats.condition, ".0e")


def _error(event: Stepped) -> str | None:
    stats = event.estimate
    return relative_error(stats.error_bound, stats.error_bound_from, event.hypergradient_norm)


def _calls(event: Stepped) -> str:
    return counts(*astuple(event.totals))


EVIDENCE = (
    Column("adj.res", 7, _residual),
    Column("cond≥", 6, _condition),
    Column("rel.err", 8, _error),
)
CALLS = Column(COUNTS, len(COUNTS), _calls)


class Clock:
    """Time left, from the second step on: the first one also warms everything up."""

    def __init__(self, event: Started | None = None) -> None:
        self.first = event.step if event else 0
        self.steps = event.steps if event else 0
        self._began: float | None = None

    def left(self, step: int) -> str:
        if self._began is None:
            self._began = time.monotonic()
        taken = step - self.first - 1
        spent = time.monotonic() - self._began
        return duration(spent / taken * (self.steps - step)) if taken else ""
