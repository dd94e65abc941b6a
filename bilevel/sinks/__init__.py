"""Where events go. A sink is a frozen component; `open` begins its record in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from bilevel.events import Event


@runtime_checkable
class Receiver(Protocol):
    """Takes the events of one run in their order; `close` is called once, whatever happened."""

    def receive(self, event: Event) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Opens a receiver in the folder of a run.

    `step` is the checkpoint that the run goes on from: what was recorded after it never
    happened. None for a run that begins.
    """

    def open(self, folder: Path, step: int | None) -> Receiver: ...
