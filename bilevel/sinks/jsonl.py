"""events.jsonl: every event of a run, as `bilevel.runfolder.record` reads it.

Tables are files of their own (the sink `rows`). What depends on how the run was computed and not
on what it computed (progress, saved checkpoints, resumption) is left out, so that the record of a run that was stopped and resumed
equals that of one never stopped, but for the fields called `seconds`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from bilevel.components import component
from bilevel.errors import CheckpointError
from bilevel.events import (
    Drawn,
    Evaluated,
    Event,
    Finished,
    Progress,
    Saved,
    Started,
    Stepped,
    Tabulated,
    Traced,
    Warned,
)
from bilevel.runfolder import record


@component
class JSONLines:
    """Every event of the run as a line of events.jsonl, flushed as it happens."""

    def open(self, folder: Path, step: int | None) -> JSONLinesWriter:
        path = folder / record.FILE
        try:
            kept = [] if step is None else record.cut(folder, step)
            file = path.open("w" if step is None else "a", encoding="utf-8")
        except OSError as error:
            raise _unwritten(path, error) from error
        return JSONLinesWriter(file, kept)


class JSONLinesWriter:
    """Appends to an open file; `kept` is what the record already holds."""

    def __init__(self, file: TextIO, kept: Sequence[Mapping[str, Any]]) -> None:
        self._file = file
        self._has_started = any(event["event"] == "started" for event in kept)
        self._evaluated = {event["step"] for event in kept if event["event"] == "evaluated"}
        self._warned = {event["kind"] for event in kept if event["event"] == "warned"}

    def receive(self, event: Event) -> None:
        if not self._is_news(event):
            return
        try:
            self._file.write(record.line(plain(event)))
            self._file.flush()
        except OSError as error:
            raise _unwritten(self._file.name, error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise _unwritten(self._file.name, error) from error

    def _is_news(self, event: Event) -> bool:
        if isinstance(event, (Progress, Saved, Tabulated, Traced)):
            return False
        if isinstance(event, Started):
            again, self._has_started = self._has_started, True
            return not again
        if isinstance(event, Evaluated):  # a run resumed at step 0 evaluates that step again
            again = event.step in self._evaluated
            self._evaluated.add(event.step)
            return not again
        if isinstance(event, Warned):
            again = event.kind in self._warned
            self._warned.add(event.kind)
            return not again
        return True


def _unwritten(path: Path | str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written: {error.strerror}; {record.REMEDY}")


def plain(event: Event) -> dict[str, Any]:
    """An event as plain data, the name of its class first."""
    if isinstance(event, Drawn):  # a figure is neither to be copied nor written here
        content: dict[str, Any] = {"step": event.step, "name": event.name}
    else:
        content = dataclasses.asdict(event)
        if isinstance(event, Finished) and not event.message:
            del content["message"]
        if isinstance(event, Stepped) and event.sent is None:
            del content["sent"]
    return {"event": type(event).__name__.lower(), **content}
