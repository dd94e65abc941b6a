"""The record of a run, events.jsonl: one event a line, strict JSON, read without importing torch.

NaN and infinities, which JSON does not have, are the strings "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bilevel.errors import CheckpointError
from bilevel.runfolder import files

FILE = "events.jsonl"
REMEDY = "make room, then resume the run"
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_AFTER_THE_LAST_STEP = ("drawn", "held", "finished")


def line(event: Mapping[str, Any]) -> str:
    """An event as one line of strict JSON."""
    return json.dumps(strict(event, _named), ensure_ascii=False, allow_nan=False) + "\n"


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in a run folder; a line cut off by a crash ends the record.

    Raises `CheckpointError` for any other line that is not an event, or a record that cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    return
                event = _parse(text)
                if event is None:
                    _refuse(path, number)
                yield event
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def read_from(folder: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from a position of the file on, as events, and the position after them.

    A record that has become shorter (of a run that was resumed) is read again from its beginning.
    Raises `CheckpointError` as `read` does.
    """
    path = folder / FILE
    if not path.is_file():
        return [], 0
    try:
        with path.open("rb") as file:
            position = position if file.seek(0, os.SEEK_END) >= position else 0
            file.seek(position)
            text = file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    events = []
    whole = text[: text.rfind(b"\n") + 1]
    for line_ in whole.splitlines():
        event = _parse(line_)
        if event is None:
            _refuse(path, path.read_bytes().split(b"\n").index(line_) + 1)
        events.append(event)
    return events, position + len(whole)


def last(folder: Path, kind: str | None = None) -> dict[str, Any] | None:
    """The last event (of a kind) in a run folder, sought from the end of the file.

    Raises `CheckpointError` as `read` does, for the lines that it meets.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return _last(path, kind)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _last(path: Path, kind: str | None) -> dict[str, Any] | None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = 0
        while length < size:
            length = min(size, 2 * length + 4096)
            file.seek(size - length)
            whole = file.read(length).split(b"\n")[:-1]
            for text in reversed(whole if length == size else whole[1:]):
                event = _parse(text)
                if event is None:
                    _refuse(path, path.read_bytes().split(b"\n").index(text) + 1)
                if kind in (None, event["event"]):
                    return event
    return None


def number(value: Any) -> float:
    """A number of the record as a float; NaN for null. Raises `CheckpointError` where it is none."""
    if value is None:
        return math.nan
    try:
        return _NUMBERS[value] if isinstance(value, str) else float(value)
    except (KeyError, TypeError, OverflowError):
        raise CheckpointError(
            f"{FILE}: holds {str(value)[:40]!r} in the place of a number: it was altered"
        ) from None


def cut(folder: Path, step: int) -> list[dict[str, Any]]:
    """Remove from the record what came after the checkpoint at `step`; returns what is left.

    Raises `CheckpointError` where it cannot be written, and the record is then as it was.
    """
    kept = []
    for event in read(folder):
        if event["step"] > step:
            break
        if event["event"] not in _AFTER_THE_LAST_STEP:
            kept.append(event)
    files.write_text(folder / FILE, "".join(map(line, kept)), remedy=REMEDY)
    return kept


def _parse(text: bytes) -> dict[str, Any] | None:
    """The event in a line, None where it is none."""
    try:
        event = files.parse(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or not {"event", "step"} <= event.keys():
        return None
    known = _FIELDS.get(event["event"]) if isinstance(event["event"], str) else None
    required = {"step": _is_count, **(known or {})}
    return event if all(k in event and holds(event[k]) for k, holds in required.items()) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float) or str(value) in _NUMBERS


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "started": {"steps": _is_count, "name": _is_text, "num_upper": _is_count}
    | {"num_lower": _is_count, "device": _is_text, "dtype": _is_text},
    "stepped": {"upper_loss": _is_number, "lower_loss": _is_number, "seconds": _is_number}
    | {"hypergradient_norm": _is_number, "estimate": _is_mapping, "totals": _are_numbers},
    "evaluated": {"metrics": _are_numbers},
    "warned": {"kind": _is_text, "message": _is_text},
    "finished": {"reason": _is_text},
}
"""What the events of a run must have, for those who read a record."""


def _refuse(path: Path, number: int) -> NoReturn:
    raise CheckpointError(
        f"{path}:{number}: the line is not an event: it was altered. Take it out, or put the file "
        "back as it was, to read the rest"
    )


def strict(value: Any, not_finite: Callable[[float], Any]) -> Any:
    """A nested value for strict JSON, with `not_finite` of every number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if isinstance(value, Mapping):
        return {key: strict(item, not_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item, not_finite) for item in value]
    return value


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
