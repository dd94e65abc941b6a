"""What is shown of a run: all of it to a person, its end alone, or its events to a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from rich.console import Console

from bilevel.cli.answer import JSONAnswer
from bilevel.errors import BilevelError
from bilevel.events import Evaluated, Event, Finished
from bilevel.runfolder import RunFolder, record
from bilevel.runfolder.folder import summary_of
from bilevel.sinks.console import ConsoleReceiver
from bilevel.sinks.jsonl import JSONLinesWriter

Measured = Sequence[Evaluated]
"""What was measured of a run that is resumed."""


class Shown(Protocol):
    """A receiver that can say that the run stops after this step."""

    def receive(self, event: Event) -> None: ...
    def stopping(self) -> None: ...
    def close(self) -> None: ...


Showing = Callable[[Console, Measured], Shown]
"""What makes the receiver of a run."""


def showing(quiet: bool, answer: JSONAnswer | None) -> Showing:
    """What makes the receiver for the options `--quiet` and `--json`."""
    if answer:
        return partial(_for_machines, answer)
    return EndAlone if quiet else ConsoleReceiver


def _for_machines(answer: JSONAnswer, console: Console, measured: Measured) -> Shown:
    return EventLines(answer)


class EndAlone:
    """Shows how a run ended, and nothing before that."""

    def __init__(self, console: Console, measured: Measured) -> None:
        # not a terminal's lines that are redrawn, which would be when they are shown again
        self._console = Console(width=console.width, force_terminal=False, quiet=True, emoji=False)
        self._receiver = ConsoleReceiver(self._console, measured)

    def receive(self, event: Event) -> None:
        self._console.quiet = not isinstance(event, Finished)
        self._receiver.receive(event)

    def stopping(self) -> None: ...

    def close(self) -> None:
        self._receiver.close()


class EventLines:
    """Each event as a line of JSON, as in events.jsonl; the stream stays open for the last line."""

    def __init__(self, answer: JSONAnswer) -> None:
        self._writer: Any = JSONLinesWriter(answer.stream, ())  # pyright: ignore[reportArgumentType]

    def receive(self, event: Event) -> None:
        self._writer.receive(event)

    def stopping(self) -> None: ...

    def close(self) -> None: ...


def conclude(answer: JSONAnswer | None, folder: RunFolder) -> None:
    """Add a run to {"event": "result", "runs": [{"run", "status", "step", …, "measures", "measured_at", "report"}]}.

    One that failed before its first step left no folder, and is not there.
    """
    if answer is None:
        return
    answer.data.setdefault("event", "result")
    runs = answer.data.setdefault("runs", [])
    if not folder.path.is_dir():
        return
    found = summary_of(folder)
    try:
        evaluated = record.last(folder.path, "evaluated")
    except BilevelError:
        evaluated = None
    runs.append(
        {
            "run": str(folder.path),
            "status": found.status,
            "step": found.step,
            "steps": found.steps,
            "upper_loss": found.upper_loss,
            "measures": evaluated["metrics"] if evaluated else {},
            "measured_at": evaluated["step"] if evaluated else None,
            "report": str(folder.report) if folder.report.is_file() else None,
        }
    )
