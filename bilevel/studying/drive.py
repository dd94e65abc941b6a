"""Cells are started, waited for and told. Any number of processes, on any number of machines, may drive one study.

A driver holds the lock of each cell that it runs, which ends with the process that has it. A cell whose lock
is free and of which nothing is kept was never begun or was left: its run goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel.studying.headroom import headroom
from bilevel.studying.plan import Asked, StudyPlan, Waiting
from bilevel.studying.results import Kept, StudyCell
from bilevel.sweeping.drive import PAUSE, Handle, hold, leave

Start = Callable[[StudyCell, list[str], Path], Handle]
"""Starts a cell with its overrides, in a folder of its own."""


@dataclass
class StudyDriver:
    """Runs the cells that are asked for and not over, at most `workers` at a time."""

    plan: StudyPlan
    selection: Asked
    folder: Path
    """Of the runs, a folder a cell."""
    start: Start
    workers: int = 1
    insist: bool = False
    """Whether cells that the study's headroom holds back are run all the same."""
    running: dict[StudyCell, tuple[Handle, ExitStack, list[str]]] = field(default_factory=dict)
    waiting: Mapping[StudyCell, str] = field(default_factory=dict)
    """Cells that could not begin, and what they wait for."""
    elsewhere: int = 0
    """Cells that another process is at."""

    def run(self) -> Iterator[StudyCell | None]:
        """The cells that have ended, one by one; None now and then in between, so that what runs can be shown."""
        try:
            while True:
                while len(self.running) < max(1, self.workers) and self._begin():
                    yield from self._ended()
                if not self.running and not (self.elsewhere and self.waiting):
                    return
                yield from self._ended()
                yield None
                if self.running or self.elsewhere:
                    time.sleep(PAUSE if self.running else 10 * PAUSE)
        finally:
            leave(self.running)

    def missing(self) -> list[StudyCell]:
        """Those that are asked for and not over."""
        return self.plan.missing(self.selection)

    def _begin(self) -> bool:
        waiting: dict[StudyCell, str] = {}
        self.elsewhere = 0
        gate = None if self.insist else headroom(self.plan)
        for cell in self.missing():
            if cell in self.running:
                continue
            if gate and gate.holds(cell):
                waiting[cell] = gate.said
                continue
            try:
                overrides = self.plan.overrides(cell)
            except Waiting as reason:
                waiting[cell] = str(reason)
                continue
            if self._take(cell, overrides):
                return True
            self.elsewhere += 1
        self.waiting = waiting
        return False

    def _take(self, cell: StudyCell, overrides: list[str]) -> bool:
        place = self.folder / cell.regime / cell.arm / cell.name
        place.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        if not hold(place, held):
            return False
        try:
            if self.plan.book.get(cell) is not None:  # another process was faster
                held.close()
                return True
            self.running[cell] = self.start(cell, overrides, place), held, overrides
        except BaseException:
            held.close()
            raise
        return True

    def _ended(self) -> Iterator[StudyCell]:
        for cell, (handle, held, overrides) in list(self.running.items()):
            died = handle.ended()
            if died is None:
                continue
            if self.plan.book.get(cell) is None:
                reason = died or "its process ended with no result"
                self.plan.book.keep(cell, Kept("failed", tuple(overrides), {}, {}, 0.0, reason))
            del self.running[cell]
            held.close()
            yield cell


def specification(
    study: Path, cell: StudyCell, overrides: list[str], place: Path
) -> dict[str, Any]:
    """What a process needs to run a cell."""
    return {
        "study": str(study),
        "cell": vars(cell),
        "overrides": overrides,
        "place": str(place),
    }
