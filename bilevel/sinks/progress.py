"""The progress of a run that Python drives: one line that is redrawn, in a terminal or a notebook."""

from __future__ import annotations

import time
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bilevel.events import Event, Progress, Started, Stepped
from bilevel.sinks import Receiver


def progress(wanted: bool | Literal["auto"], console: Console | None = None) -> Receiver | None:
    """What shows progress, on stderr; "auto" is None where neither a person nor a notebook reads it.

    In a notebook one output is updated, which needs no widgets; a log gets a line every 10 % of
    the steps, if progress is asked for there.
    """
    console = console or Console(stderr=True)
    if not wanted:
        return None
    if console.is_jupyter:
        return Lines(NotebookOutput(), every=0.1)
    if console.is_terminal:
        return Redrawn(console)
    return None if wanted == "auto" else Lines(console.file, every=None)


class Redrawn:
    """A bar in a terminal, gone when the run ends."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._reading = Reading()

    def receive(self, event: Event) -> None:
        if not self._reading.takes(event):
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", count="", note="")
        seen = self._reading
        self._bar.update(
            self._task,
            description=seen.stage,
            completed=seen.done,
            total=seen.total,
            count=seen.count,
            note=seen.note,
        )

    def close(self) -> None:
        self._bar.stop()


class Lines:
    """The same as text, written to `out`: at most every so many seconds, or every tenth of a stage."""

    def __init__(self, out: Any, every: float | None) -> None:
        self._out, self._every = out, every
        self._reading = Reading()
        self._said: tuple[str, float] = ("", -1.0)

    def receive(self, event: Event) -> None:
        seen = self._reading
        if not seen.takes(event):
            return
        if self._every is None:
            now, due = 10 * seen.done // (seen.total or 1), 1.0
        else:
            now, due = time.monotonic(), self._every
        stage, last = self._said
        if stage != seen.stage or now - last >= due or seen.done == seen.total:
            self._said = (seen.stage, now)
            self._out.write(f"{seen.stage} {seen.count}  {seen.note}".rstrip() + "\n")

    def close(self) -> None:
        self._out.flush()


class Reading:
    """What an event says of how far a run is."""

    def __init__(self) -> None:
        self.stage, self.note = "", ""
        self.done, self.total = 0, None
        self._steps = 0

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}"

    def takes(self, event: Event) -> bool:
        """Whether it says anything."""
        if isinstance(event, Progress):
            self._is(event.stage, event.done, event.total, event.note)
        elif isinstance(event, Started):
            self._steps = event.steps
            self._is("step", event.step, event.steps)
        elif isinstance(event, Stepped):
            losses = f"F {event.upper_loss:.3e}  G {event.lower_loss:.3e}"
            note = f"{losses}  ‖dΦ/dx‖ {event.hypergradient_norm:.1e}"
            self._is("step", event.step, self._steps, note)
        else:
            return False
        return True

    def _is(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        self.stage, self.done, self.total, self.note = stage, done, total, note


class NotebookOutput:
    """An output of a notebook's cell that shows the last line written to it."""

    def __init__(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, line: str) -> None:
        self._handle.update({"text/plain": line.rstrip("\n")}, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""
