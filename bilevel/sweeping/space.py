"""What a sweep varies, as it is typed: `key=1e-3..1e-1,log`, `key=5..50,int`, `key=a,b,c`. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bilevel.errors import RecipeError

MOST_VALUES = 1000
MOST_POINTS = 10_000
_RANGE = re.compile(r"([^./\\'\"\[{]|\.(?!\.))+\.\.[^/\\]*")
_OPENED, _CLOSED = "[{(", "]})"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both ends included."""

    key: str
    low: float
    high: float
    is_log: bool = False
    is_int: bool = False
    points: int | None = None
    """How many a grid takes; None where it takes every integer."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Values to be checked before anything runs."""
        return written(self.low, self.is_int), written(self.high, self.is_int)

    def grid(self) -> list[float]:
        """Evenly spaced values, in their logarithm where `is_log`, both ends exact."""
        if self.points is None:
            return [float(n) for n in range(int(self.low), int(self.high) + 1)]
        last = self.points - 1
        ratio = [n / last for n in range(1, last)]
        if self.is_log:
            inner = [self.low * (self.high / self.low) ** part for part in ratio]
        else:
            inner = [self.low + (self.high - self.low) * part for part in ratio]
        values = [self.low, *inner, self.high]
        return sorted({float(round(v)) for v in values}) if self.is_int else values


@dataclass(frozen=True)
class Choices:
    """Values as they stand in an override."""

    key: str
    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        return self.values

    def grid(self) -> list[str]:
        return list(self.values)


Dimension = Range | Choices


def written(value: float | str, is_int: bool = False) -> str:
    """A value as an override has it; `float` reads back the same number."""
    if isinstance(value, str):
        return value
    return str(int(value)) if is_int else repr(float(value))


def parse(words: Iterable[str]) -> tuple[list[Dimension], list[str]]:
    """What is varied, and the overrides among the words that hold for every trial.

    Raises `RecipeError` for a range or a list that is none.
    """
    varied: list[Dimension] = []
    fixed: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        found = _dimension(word, key.strip(), text.strip()) if equals else None
        if found is None:
            fixed.append(word)
        else:
            varied.append(found)
    keys = [each.key for each in varied]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise RecipeError(f"{twice[0]} is varied twice; write one range or one list of it")
    return varied, fixed


def _dimension(word: str, key: str, text: str) -> Dimension | None:
    parts = _parts(text)
    is_range = _RANGE.fullmatch(parts[0]) is not None
    if key in ("seed", "seeds"):
        return None  # every trial has them all
    if not is_range and len(parts) == 1:
        return None
    if not key:
        raise RecipeError(f"{word!r}: names no key; write e.g. upper.optimizer.lr={text}")
    if is_range:
        return _range(word, key, parts)
    if not all(parts):
        raise RecipeError(f"{word!r}: a value is empty; write e.g. {key}=a,b,c")
    if len(parts) > MOST_VALUES:
        raise RecipeError(f"{word[:40]!r}…: {len(parts):,} values; at most {MOST_VALUES:,}")
    if len(set(parts)) < len(parts):
        raise RecipeError(f"{word!r}: a value stands twice")
    return Choices(key, tuple(parts))


def _range(word: str, key: str, parts: Sequence[str]) -> Range:
    low_text, _, high_text = parts[0].partition("..")
    low, high = _number(low_text), _number(high_text)
    if low is None or high is None:
        wrong = low_text if low is None else high_text
        raise RecipeError(f"{word!r}: the ends of a range must be finite numbers; got {wrong!r}")
    options = [part for part in parts[1:] if not part.isdecimal()]
    counts = [int(part) for part in parts[1:] if part.isdecimal() and len(part) < 10]
    unknown = [part for part in options if part not in ("log", "int")]
    if unknown or len(counts) + len(options) < len(parts) - 1 or len(counts) > 1:
        raise RecipeError(
            f"{word!r}: after a range stand log, int and a number of points for a grid; got "
            f"{(unknown or parts[-1:])[0]!r}"
        )
    if not low < high:
        raise RecipeError(f"{word!r}: the smaller end first, and not two that are equal")
    if "log" in options and low <= 0:
        raise RecipeError(f"{word!r}: a log range must begin above 0; got {low_text}")
    if "int" in options and not (low.is_integer() and high.is_integer()):
        raise RecipeError(f"{word!r}: the ends of an int range must be integers")
    points = counts[0] if counts else None
    if points is not None and not 2 <= points <= MOST_VALUES:
        raise RecipeError(f"{word!r}: {points:,} points; from 2 to {MOST_VALUES:,}")
    return Range(key, low, high, "log" in options, "int" in options, points)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _parts(text: str) -> list[str]:
    """Split at the commas that stand within no brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _OPENED:
            depth += 1
        elif sign in _CLOSED:
            depth -= 1
        elif sign == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += sign
    return [part.strip() for part in parts]


def grid_size(space: Sequence[Dimension]) -> int:
    """How many points the grid has; raises `RecipeError` where it cannot have one, or too many."""
    size = 1
    for each in space:
        if isinstance(each, Range) and each.points is None and not each.is_int:
            way = ",log" if each.is_log else ""
            raise RecipeError(
                f"{each.key}: a grid needs a number of points in a range: "
                f"{each.key}={each.low:g}..{each.high:g}{way},5"
            )
        if isinstance(each, Range) and each.points is None:
            size *= int(each.high - each.low) + 1
        else:
            size *= len(each.grid())
    if size > MOST_POINTS:
        raise RecipeError(
            f"the grid has {size:,} points; at most {MOST_POINTS:,}. Take fewer values, or "
            "--sampler random or tpe with --trials"
        )
    return size
