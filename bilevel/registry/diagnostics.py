"""Everything that is wrong with a recipe, said at once: where, what was got, what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bilevel.components import UNSAID, Where, refused, show
from bilevel.errors import RecipeError, unknown

MOST = 50
"""Errors that are shown at once."""


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

    def add(self, where: Where, message: str, value: Any = UNSAID) -> None:
        """Complain about `where`, and show the value that was got if one is given."""
        origin = self._origin(where)
        place = ".".join(map(str, where))
        if value is not UNSAID:
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
        for part, (message, value) in refused(error, given, failed).items():
            self.add((*where, *part), message, value)

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
