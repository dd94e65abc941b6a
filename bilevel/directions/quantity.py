"""What a direction is made of: a stochastic quantity that can be evaluated where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from bilevel import tree
from bilevel.types import Params

Parts = dict[str, Params]
"""A quantity as the share of the lower batch ("lower") and that of the upper batch ("upper")."""


@dataclass(frozen=True)
class StochasticQuantity:
    """One quantity on the batches drawn now. Nothing is evaluated, or counted, before it is asked for."""

    now: Callable[[], Parts]
    """At the present point."""
    before: Callable[[], Parts]
    """On the same batches, at the point of the iteration before."""
    full: Callable[[], Parts]
    """At the present point, averaged over every block of data."""
    block: Callable[[str], tuple[int, int]]
    """(block, number of blocks) of the lower or of the upper batch."""


@runtime_checkable
class Direction(Protocol):
    """Turns draws of a quantity into a direction. Frozen; what it remembers is `memory`.

    `take` gets {} the first time; `looks_back` says whether it asks for `StochasticQuantity.before`, `by_block`
    whether it asks for `StochasticQuantity.full` or `StochasticQuantity.block`, which a batch without a number has not.
    """

    by_block: ClassVar[bool]

    @property
    def looks_back(self) -> bool: ...
    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]: ...


def total(parts: Parts) -> Params:
    """The quantity itself: the sum of its shares."""
    first, *others = parts.values()
    for other in others:
        first = tree.add(first, other)
    return first


def change(draw: StochasticQuantity) -> Params:
    """What the quantity has changed by since the point before, on the batches drawn now."""
    return tree.sub(total(draw.now()), total(draw.before()))
