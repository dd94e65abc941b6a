"""`runs --watch`: a run of another process, followed by its record until it ends; imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bilevel.cli.selection import chosen, listed
from bilevel.errors import RecipeError
from bilevel.runfolder import record
from bilevel.runfolder.folder import RunFolder, find
from bilevel.sinks.numbers import dated, duration, significant

EVERY = 0.5
"""Seconds between two looks at the record."""
RECENT = 20
"""Steps whose mean time says how long the rest takes."""


def watch(console: Console, reference: str, runs: Path, where: Sequence[str]) -> None:
    """Show a run until it ends: the one that is named, or the newest that is running.

    Raises `RecipeError` where none is running, `CheckpointError` for a record that was altered.
    """
    folder = find(reference, runs) if reference else _newest(runs, where)
    console.print(Text(f"{folder.path}/", style="dim"), soft_wrap=True)
    seen = _Watched()
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            for events in _followed(folder):
                for event in events:
                    seen.takes(event)
                live.update(Text(seen.line(console.width)), refresh=True)
    else:
        shown = -1
        for event in chain.from_iterable(_followed(folder)):
            seen.takes(event)
            part = 20 * seen.step // max(1, seen.steps)
            if event["event"] == "stepped" and part != shown:
                shown = part
                console.print(seen.line(80), markup=False, highlight=False, soft_wrap=True)
    _conclude(console, seen)


def _newest(runs: Path, where: Sequence[str]) -> RunFolder:
    running = [each for each in chosen(listed(runs), where) if each.summary.status == "running"]
    if not running:
        raise RecipeError(f"no run in {runs}/ is running; name one to see how it ended")
    return running[-1].summary.folder


def _followed(folder: RunFolder) -> Iterator[list[dict[str, Any]]]:
    """The events of a run as they are written, those so far at once, until its end or that of its process."""
    position = 0
    while True:
        is_alive = folder.is_locked()
        events, position = record.read_from(folder.path, position)
        yield events
        if any(event["event"] == "finished" for event in events[-1:]) or not is_alive:
            return
        time.sleep(EVERY)


class _Watched:
    """What is known of a run from its events so far."""

    def __init__(self) -> None:
        self.name, self.step, self.steps = "", 0, 0
        self.last: dict[str, Any] | None = None
        self.first_measures: dict[str, Any] = {}
        self.measures: dict[str, Any] = {}
        self.measured_at: int | None = None
        self.warnings: dict[str, str] = {}
        self.finished: dict[str, Any] | None = None
        self._seconds: list[float] = []

    def takes(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self.step = event["step"]
        self.finished = event if kind == "finished" else None  # a run that is resumed goes on
        if kind == "started":
            self.name, self.steps = event["name"], event["steps"]
        elif kind == "stepped":
            self.last = event
            self._seconds = [*self._seconds[1 - RECENT :], record.number(event["seconds"])]
        elif kind == "evaluated":
            self.measures, self.measured_at = event["metrics"], event["step"]
            if not self.step:
                self.first_measures = self.measures
        elif kind == "warned":
            self.warnings[event["kind"]] = event["message"]

    def line(self, width: int) -> str:
        """`quadratic 57/200  F 3.07e+01  G -2.1e+00  ‖dΦ/dx‖ 1.2e-01  about 12s left`, as it fits."""
        parts = [f"{self.name} {self.step:,}/{self.steps:,}"]
        if self.last:
            parts += [
                f"{sign} {record.number(self.last[key]):.{digits}e}"
                for sign, key, digits in (
                    ("F", "upper_loss", 3),
                    ("G", "lower_loss", 3),
                    ("‖dΦ/dx‖", "hypergradient_norm", 1),
                )
            ]
            mean = sum(self._seconds) / len(self._seconds)
            parts.insert(1, f"{duration(mean * (self.steps - self.step))} left")
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)


def _conclude(console: Console, seen: _Watched) -> None:
    end = seen.finished["reason"] if seen.finished else "stopped without a word of its end"
    console.print(f"{end} at step {seen.step:,} of {seen.steps:,}", highlight=False)
    if seen.finished and seen.finished.get("message"):
        console.print(seen.finished["message"], markup=False, highlight=False)
    if seen.last:
        loss = record.number(seen.last["upper_loss"])
        console.print(f"upper loss F {significant(loss)}", highlight=False)
    at = seen.measured_at
    for name, value in seen.measures.items():
        parts = [dated(significant(record.number(value)), at, seen.step)] if at else []
        if name in seen.first_measures:
            parts.append(f"{significant(record.number(seen.first_measures[name]))} before")
        console.print(f"{name} {', '.join(parts)}", markup=False, highlight=False)
    for message in seen.warnings.values():
        console.print(Text.assemble(("warned: ", "yellow"), message))
