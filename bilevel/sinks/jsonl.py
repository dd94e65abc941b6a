"""The record of a run: events.jsonl, one event a line, strict JSON.

NaN and infinities, which JSON does not have, are the strings "NaN", "Infinity", "-Infinity".
What depends on how the run was computed and not on what it computed (progress, saved
checkpoints, resumption) is left out, so that the record of a run that was stopped and resumed
equals that of one never stopped, but for fields called `seconds`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from bilevel.errors import CheckpointError
from bilevel.events import Drawn, Event, Finished, Progress, Saved, Started, Warned
from bilevel.types import component

FILE = "events.jsonl"


@component
class JSONLines:
    """Every event of the run as a line of events.jsonl, flushed as it happens."""

    def open(self, folder: Path, step: int | None) -> JSONLinesWriter:
        path = folder / FILE
        if step is None:
            kept: list[dict[str, Any]] = []
            path.write_text("", encoding="utf-8")
        else:
            kept = cut(path, step)
        return JSONLinesWriter(path.open("a", encoding="utf-8"), kept)


class JSONLinesWriter:
    """Appends to an open file; `kept` is what the record already holds."""

    def __init__(self, file: TextIO, kept: list[dict[str, Any]]) -> None:
        self._file = file
        self._has_started = any(line["event"] == "started" for line in kept)
        self._warned = {line["kind"] for line in kept if line["event"] == "warned"}

    def receive(self, event: Event) -> None:
        if isinstance(event, (Progress, Saved)):
            return
        if isinstance(event, Started):
            if self._has_started:
                return
            self._has_started = True
        if isinstance(event, Warned):
            if event.kind in self._warned:
                return
            self._warned.add(event.kind)
        try:
            self._file.write(encode(event) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: cannot be written: {error.strerror}; make room, then "
                "resume the run"
            ) from error

    def close(self) -> None:
        self._file.close()


def encode(event: Event) -> str:
    """One line of strict JSON, the event's class first."""
    content = dataclasses.asdict(_without_figure(event))
    content.pop("figure", None)
    plain = {"event": type(event).__name__.lower(), **_strict(content)}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in a run folder, as plain data; a line cut off by a crash ends the record."""
    path = folder / FILE
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        yield json.loads(line)


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove from the record what came after the checkpoint at `step`; returns what is left."""
    kept: list[dict[str, Any]] = []
    for line in read(path.parent):
        if line["step"] > step:
            break
        if line["event"] != Finished.__name__.lower():
            kept.append(line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return kept


def _without_figure(event: Event) -> Event:
    """asdict copies deeply, and a figure is not to be copied."""
    return dataclasses.replace(event, figure=None) if isinstance(event, Drawn) else event


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
