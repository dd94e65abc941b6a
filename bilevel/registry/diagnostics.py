"""Everything that is wrong with a recipe, said at once: where, what was got, what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bilevel.errors import RecipeError, unknown

Where = tuple[str | int, ...]
"""The keys that lead to a value: ("lower", "optimizer", "lr")."""

MOST = 50
"""Errors that are shown at once."""

_UNSAID = object()

_EXPECTED = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be ≥ {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be ≤ {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "finite_number": "must be finite",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "is_instance_of": "must be a component of type {class}",
    "dataclass_exact_type": "must be a mapping of {class_name}'s options",
}


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `file.yaml:6`, or an override; `order` sorts what is shown."""

    text: str
    order: int
    base: Path | None = None
    """What files named there are relative to, where that is not the folder of the recipe."""


class Complaints:
    """Collects what is wrong; `finish` raises one `RecipeError` that shows all of it."""

    def __init__(self, title: str = "", origins: Mapping[Where, Origin] | None = None) -> None:
        self._title = title
        self._origins = {} if origins is None else origins
        self._said: list[tuple[int, str]] = []

    def add(self, where: Where, message: str, value: Any = _UNSAID) -> None:
        """Complain about `where`, and show the value that was got if one is given."""
        origin = self._origin(where)
        place = ".".join(map(str, where))
        if value is not _UNSAID:
            text = f"{place} = {show(value)}; {message}"
        else:
            text = f"{place}: {message}" if place else message
        if origin is None:
            self._said.append((-1, f"{self._title}: {text}" if self._title else text))
        else:
            self._said.append((origin.order, f"{origin.text}: {text}"))

    def add_unknown_key(self, where: Where, known: list[str], remedy: str = "") -> None:
        """Complain about a key that nothing reads."""
        _, _, hint = unknown(str(where[-1]), known, "key").partition("unknown key. ")
        self.add(where, f"unknown key. {hint}{remedy}")

    def add_validation(
        self, error: ValidationError, where: Where, given: Any, failed: Collection[str] = ()
    ) -> None:
        """Translate what pydantic found in `given`, the value or the options at `where`.

        Of a component whose options in `failed` were complained about before, only the other
        options are judged.
        """
        found: dict[Where, tuple[list[str], Any]] = {}
        for detail in error.errors(include_url=False):
            loc = detail["loc"]
            if failed and (not loc or loc[0] in failed):
                continue
            place = where + _known_part(loc, given)
            value = _UNSAID if place == where and isinstance(given, dict) else detail["input"]
            messages, _ = found.setdefault(place, ([], value))
            messages.append(_expected(detail))
        for place, (messages, value) in found.items():
            self.add(place, _either(messages), value)

    def base(self, where: Where) -> Path | None:
        """What a file that is named at `where` is relative to; None for the folder of the recipe."""
        origin = self._origin(where)
        return origin.base if origin else None

    def finish(self) -> None:
        """Raise `RecipeError` if anything was said."""
        lines = list(dict.fromkeys(text for _, text in sorted(self._said, key=lambda s: s[0])))
        if not lines:
            return
        if len(lines) > 1:
            more = len(lines) - MOST
            head = f"{self._title}: {len(lines)} errors" if self._title else f"{len(lines)} errors"
            lines = [head, *(f"  {line}" for line in lines[:MOST])]
            if more > 0:
                lines.append(f"  … and {more:,} more")
        raise RecipeError("\n".join(lines))

    def __bool__(self) -> bool:
        return bool(self._said)

    def _origin(self, where: Where) -> Origin | None:
        for length in range(len(where), -1, -1):
            if where[:length] in self._origins:
                return self._origins[where[:length]]
        return None


def show(value: Any) -> str:
    """A value as YAML would have it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return str(value["name"])
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _own_words(detail: Any) -> str:
    cause = detail.get("ctx", {}).get("error")
    return str(cause) if cause is not None else detail["msg"]


def _expected(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return _own_words(detail)
    message = _EXPECTED.get(kind)
    text = message.format(**context) if message else detail["msg"][:1].lower() + detail["msg"][1:]
    if kind in ("int_type", "float_type") and _reads_as_number(detail["input"]):
        text += " (remove the quotes)"
    return text


def _either(messages: list[str]) -> str:
    first, *rest = dict.fromkeys(messages)
    return " or ".join([first, *(message.removeprefix("must be ") for message in rest)])


def _reads_as_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _known_part(loc: tuple[str | int, ...], given: Any) -> Where:
    """The location without pydantic's own tags for the members of a union."""
    known: list[str | int] = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:
            known.append(part)
            given = given[part]
        elif isinstance(given, (list, tuple)) and isinstance(part, int):
            known.append(part)
            given = given[part] if part < len(given) else None
    return tuple(known)
