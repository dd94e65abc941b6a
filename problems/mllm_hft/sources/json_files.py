"""JSON and JSON lines, entry by entry, each with the line it begins on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bilevel.errors import ProblemError, RequirementError, nearest

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Text:
    """A file and what is in it."""

    path: str
    content: str


@dataclass(frozen=True)
class Entry:
    """An object of a file, and where it begins."""

    value: dict[str, Any]
    text: Text
    offset: int
    label: str = ""
    """Its place in a list: "annotations[3]"."""

    def __str__(self) -> str:
        line = 1 + self.text.content.count("\n", 0, self.offset)
        return f"{self.text.path}:{line}" + (f" ({self.label})" if self.label else "")

    def refuse(self, what: str) -> NoReturn:
        """Raises `ProblemError` that names file and line."""
        raise ProblemError(f"{self}: {what}")

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of a key. Raises `ProblemError` where it is missing or of another type."""
        if key not in self.value:
            if default is not ...:
                return default
            near = nearest(key, self.value)
            hint = f"; did {near[0]!r} mean it?" if near else ""
            keys = ", ".join(map(repr, self.value)) or "nothing"
            self.refuse(f"has no {key!r}, only {keys}{hint}")
        value = self.value[key]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(_NAMES[kind] for kind in kinds)
            self.refuse(f"{key!r} is {_short(value)}; must be {names}")
        return value

    def text_of(self, key: str, default: Any = ...) -> Any:
        """A text that is not blank."""
        value = self.get(key, str, default)
        if value is not default and not value.strip():
            self.refuse(f"{key!r} is blank")
        return value

    def said(self, text: str, what: str) -> str:
        """A text that is about the picture, without the mark for it. Raises where it is blank."""
        if not (plain := without_mark(text)).strip():
            self.refuse(f"{what} is blank")
        return plain

    def id_of(self, key: str, default: Any = ...) -> Any:
        """A number or a text as an identifier."""
        value = self.get(key, (str, int), default)
        return value if value is default else str(value)

    def known_keys(self, keys: Sequence[str]) -> None:
        """Raises `ProblemError` for a key that is not among them, and suggests the nearest."""
        for key in self.value:
            if key not in keys:
                near = nearest(key, keys)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(keys)}"
                self.refuse(f"unknown key {key!r}{hint}")


def without_mark(text: str) -> str:
    """Without LLaVA's mark for the picture: where that stands, the model's template says."""
    return text.replace("<image>", "").strip() if "<image>" in text else text


_NAMES = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def json_lines(path: str) -> list[Entry]:
    """One object a line; blank lines are passed over."""
    text = read(path)
    entries, offset = [], 0
    for line in text.content.split("\n"):
        if line.strip():
            entries.append(_object(text, line, offset))
        offset += len(line) + 1
    return _some(entries, text)


def json_list(path: str) -> list[Entry]:
    """The objects of a list, or one object a line."""
    text = read(path)
    start = _skip(text.content, 0)
    if start < len(text.content) and text.content[start] == "[":
        return _some(_list(text, start, "")[0], text)
    return json_lines(path)


def json_lists(path: str, keys: Sequence[str]) -> dict[str, list[Entry]]:
    """The lists of objects under some keys of one object, as COCO's files have them."""
    text = read(path)
    content, at = text.content, _skip(text.content, 0)
    if at >= len(content) or content[at] != "{":
        _refuse(text, at, f"must be an object with {', '.join(map(repr, keys))}")
    found: dict[str, list[Entry]] = {}
    at = _skip(content, at + 1)
    while at < len(content) and content[at] != "}":
        key, at = _decode(text, at)
        at = _expect(text, at, ":")
        if key in keys and content[at : at + 1] == "[":
            found[key], at = _list(text, at, str(key))
        else:
            _, at = _decode(text, at)
            at = _skip(content, at)
        if content[at : at + 1] == ",":
            at = _skip(content, at + 1)
        elif content[at : at + 1] != "}":
            _refuse(text, at, "malformed JSON: ',' or '}' expected; is the file cut short?")
    if content[at : at + 1] != "}":
        _refuse(text, at, "malformed JSON: '}' expected; is the file cut short?")
    for key in keys:
        if key not in found:
            raise ProblemError(f"{path}: has no list {key!r}; found: {', '.join(found) or 'none'}")
    return found


def json_object(path: str) -> Entry:
    """A file that holds one object."""
    text = read(path)
    start = _skip(text.content, 0)
    value, _ = _decode(text, start)
    if not isinstance(value, dict):
        _refuse(text, start, f"must be an object, got {_short(value)}")
    return Entry(value, text, start)


def read(path: str) -> Text:
    """A file's text. Raises `RequirementError` where there is none, `ProblemError` where it is empty."""
    try:
        content = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequirementError(
            f"{path}: cannot be read ({error.strerror}); is the path right?"
        ) from error
    except UnicodeDecodeError as error:
        raise ProblemError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    if not content.strip():
        raise ProblemError(f"{path}: the file is empty")
    return Text(path, content)


def _list(text: Text, start: int, key: str) -> tuple[list[Entry], int]:
    """Objects of the list that begins at `start`, and the place after the list."""
    content, at = text.content, _skip(text.content, start + 1)
    found: list[Entry] = []
    while content[at : at + 1] != "]":
        value, end = _decode(text, at)
        found.append(Entry(value, text, at, f"{key}[{len(found)}]"))
        if not isinstance(value, dict):
            found[-1].refuse(f"must be an object, got {_short(value)}")
        at = _skip(content, end)
        if content[at : at + 1] == ",":
            at = _skip(content, at + 1)
        elif content[at : at + 1] != "]":
            _refuse(text, at, "malformed JSON: ',' or ']' expected; is the file cut short?")
    return found, _skip(content, at + 1)


def _object(text: Text, line: str, offset: int) -> Entry:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        _refuse(text, offset, f"malformed JSON: {error.msg} at column {error.colno}")
    entry = Entry(value, text, offset)
    if not isinstance(value, dict):
        entry.refuse(f"must be an object, got {_short(value)}")
    return entry


def _decode(text: Text, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text.content, at)
    except json.JSONDecodeError as error:
        _refuse(text, error.pos, f"malformed JSON: {error.msg}")


def _expect(text: Text, at: int, mark: str) -> int:
    at = _skip(text.content, at)
    if text.content[at : at + 1] != mark:
        _refuse(text, at, f"malformed JSON: {mark!r} expected")
    return _skip(text.content, at + 1)


def _skip(content: str, at: int) -> int:
    while at < len(content) and content[at] in _SPACE:
        at += 1
    return at


def _some(entries: list[Entry], text: Text) -> list[Entry]:
    if not entries:
        raise ProblemError(f"{text.path}: holds no entry")
    return entries


def _refuse(text: Text, at: int, what: str) -> NoReturn:
    raise ProblemError(f"{text.path}:{1 + text.content.count(chr(10), 0, at)}: {what}")


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
