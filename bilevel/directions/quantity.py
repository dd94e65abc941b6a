"""What a direction is made of: a stochastic quantity that can be evaluated where it is wanted."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from bilevel.types import Params


class StochasticQuantity(Protocol):
    """One quantity on the batches drawn now. Nothing is evaluated, or counted, before it is asked for."""

    def now(self) -> Params:
        """At the present point."""
        ...

    def before(self) -> Params:
        """On the same batches, at the point of the iteration before."""
        ...

    def full(self) -> Params:
        """At the present point, averaged over every block of data."""
        ...

    def shares(self) -> dict[str, Params]:
        """`now` as the share of the lower batch ("lower") and that of the upper batch ("upper"): its sum."""
        ...

    def block(self, share: str) -> tuple[int, int]:
        """(block, number of blocks) of the lower or of the upper batch."""
        ...


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
