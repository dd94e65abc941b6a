"""Which runs, in what order: conditions and sorting by columns, measures and settings; imports no torch."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from bilevel import registry, sweeping
from bilevel.errors import BilevelError, RecipeError, nearest
from bilevel.recipe.settings import NUMERIC, flattened, shown
from bilevel.recipe.yaml_source import parse
from bilevel.runfolder import record
from bilevel.runfolder.folder import RunFolder, Summary, summaries, summary_of
from bilevel.sinks.numbers import dated, significant

Value = str | float | None
_CONDITION = re.compile(r"(.+?)(<=|>=|!=|=|<|>)(.*)", re.DOTALL)
_ORDERS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Listed:
    """A run with what it can be chosen by; each part is read when it is asked for.

    What cannot be read of a damaged run is not there: it matches no condition on it.
    """

    summary: Summary
    runs: Path

    @property
    def path(self) -> str:
        """Relative to the folder of runs, where it lies in it."""
        path = self.summary.folder.path
        return str(path.relative_to(self.runs)) if path.is_relative_to(self.runs) else str(path)

    @property
    def sweep(self) -> str | None:
        """The sweep that it is a trial of, as its folder is called."""
        folder = self.summary.folder.path.parent
        return folder.name if (folder / sweeping.FILE).is_file() else None

    @cached_property
    def columns(self) -> dict[str, Value]:
        found = self.summary
        return {
            "run": self.path,
            "name": found.name,
            "status": found.status,
            "step": found.step,
            "steps": found.steps,
            "estimator": found.estimator,
            "upper_loss": found.upper_loss,
            "sweep": self.sweep,
        }

    @cached_property
    def measures(self) -> dict[str, Value]:
        """The problem's last measures, and what the last step says."""
        try:
            stepped = record.last(self.summary.folder.path, "stepped")
            found = {} if stepped is None else _of_step(stepped)
            measured = self._evaluated.get("metrics", {})
            return found | {name: record.number(value) for name, value in measured.items()}
        except BilevelError:
            return {}

    @property
    def measured_at(self) -> int | None:
        """The step at which the problem's own measures were last taken."""
        return self._evaluated.get("step")

    def dated(self, text: str, measure: str) -> str:
        """A measure as it is written, with its step where that is not the one the run has reached."""
        is_own = measure in self._evaluated.get("metrics", {})
        return dated(text, self.measured_at, self.summary.step) if is_own else text

    @cached_property
    def _evaluated(self) -> Mapping[str, Any]:
        try:
            return record.last(self.summary.folder.path, "evaluated") or {}
        except BilevelError:
            return {}

    @cached_property
    def made_with(self) -> dict[str, Value]:
        """What its numbers depend on, flat, as it was recorded; a run of an older version has its recipe's."""
        try:
            found = self.summary.folder.environment().get("settings")
        except BilevelError:
            return {}
        if not isinstance(found, dict):
            numeric = self.settings.items()
            return {key: value for key, value in numeric if key.partition(".")[0] in NUMERIC}
        return {key: _plain(str(value)) for key, value in found.items()}

    @cached_property
    def settings(self) -> dict[str, Value]:
        """All of the recipe's, flat, as numbers where they are: to be parsed, which takes 20 ms."""
        try:
            text = self.summary.folder.resolved.read_text(encoding="utf-8")
            content = parse(text, str(self.summary.folder.resolved)).data
            return {key: _plain(value) for key, value in flattened(content).items()}
        except (BilevelError, OSError, UnicodeDecodeError):
            return {}


def listed(runs: Path, references: Sequence[str] | None = None) -> list[Listed]:
    """The runs that are named, or all below `runs`, the newest last."""
    if references:
        from bilevel.runfolder.folder import find_all

        folders = [folder for each in references for folder in find_all(each, runs)]
        return [Listed(summary_of(folder), runs) for folder in dict.fromkeys(folders)]
    return [Listed(summary, runs) for summary in summaries(runs)]


def chosen(found: Sequence[Listed], conditions: Iterable[str]) -> list[Listed]:
    """Those that meet every condition: `status=done`, `estimator=unroll`, `upper_loss<0.1`, `name=quad*`.

    Raises `RecipeError` for a condition that is none, or a key that no run has.
    """
    tests = [_test(found, condition) for condition in conditions]
    return [each for each in found if all(test(each) for test in tests)]


def _test(found: Sequence[Listed], condition: str) -> Callable[[Listed], bool]:
    match = _CONDITION.fullmatch(condition)
    if not match:
        raise RecipeError(
            f"--where {condition!r}: must be like KEY=VALUE, KEY!=VALUE, KEY<NUMBER or KEY>=NUMBER"
        )
    key, sign, wanted = (part.strip() for part in match.groups())
    if sign in _ORDERS and _number(wanted) is None:
        raise RecipeError(f"--where {condition!r}: {sign} compares numbers; got {wanted!r}")
    of = column(found, key, "--where")
    return lambda each: _holds(of(each), sign, wanted)


def ordered(found: Sequence[Listed], key: str, descending: bool = False) -> list[Listed]:
    """Sorted by a key, `-key` or `descending` from the largest; those that lack it come last."""
    of = column(found, key.removeprefix("-"), "--sort")
    known = [each for each in found if not _is_missing(of(each))]
    rest = [each for each in found if _is_missing(of(each))]

    def rank(each: Listed) -> tuple[bool, float, str]:
        value = of(each)
        is_text = isinstance(value, str)
        return is_text, 0.0 if is_text else float(value or 0), str(value)

    return [*sorted(known, key=rank, reverse=descending or key.startswith("-")), *rest]


def column(found: Sequence[Listed], key: str, option: str) -> Callable[[Listed], Value]:
    """What a run has below `key`: a column, a measure, or a setting by its dotted key or its last part.

    Raises `RecipeError` as `meant` does.
    """
    part, names = meant(found, key, option)
    return lambda each: _first(getattr(each, part), names)[1]


def cell(found: Sequence[Listed], key: str, option: str) -> Callable[[Listed], str]:
    """What `column` gives as it is shown: a measure that was not taken at the last step with its step."""
    part, names = meant(found, key, option)

    def written(each: Listed) -> str:
        name, value = _first(getattr(each, part), names)
        if value is None:
            return "-"
        text = value if isinstance(value, str) else significant(value)
        return each.dated(text, name) if part == "measures" else text

    return written


def meant(found: Sequence[Listed], key: str, option: str) -> tuple[str, Sequence[str]]:
    """(which part of a `Listed`, the names there) that a key stands for; a run has one of the names at most.

    `estimator` is the component's name; a measure may be told by how it begins. Raises `RecipeError`
    for a key that no run has, or that stands for several.
    """
    if not found or key in found[0].columns:
        return "columns", [key]
    measures = dict.fromkeys(name for each in found for name in each.measures)
    same = [name for name in measures if _spelled(name) == _spelled(key)]
    if same:
        return "measures", same
    begun = [name for name in measures if _spelled(name).startswith(_spelled(key))]
    for part in (
        "made_with",
        "settings",
    ):  # the whole recipe where it is not among what is recorded
        settings = dict.fromkeys(name for each in found for name in getattr(each, part))
        for name in (key, f"{key}.name"):
            if name in settings:
                return part, [name]
        ends = [name for name in settings if name.removesuffix(".name").endswith(f".{key}")]
        near = begun or ends
        if len(near) > 1:
            raise RecipeError(f"{option} {key}: stands for {', '.join(near)}; write one of them")
        if near:
            return "measures" if begun else part, near
    known = [*found[0].columns, *map(_spelled, measures)]
    if nearest(key, settings):
        known += settings
    said = registry.unknown(key, known, "column, measure or setting")
    raise RecipeError(f"{option} {said} A setting is one like upper.optimizer.lr")


def _first(of: Mapping[str, Value], names: Sequence[str]) -> tuple[str, Value]:
    return next(((name, of[name]) for name in names if name in of), ("", None))


def _of_step(stepped: Mapping[str, Any]) -> dict[str, Value]:
    totals = [record.number(value) for value in stepped["totals"].values()]
    return {
        "lower_loss": record.number(stepped["lower_loss"]),
        "hypergradient_norm": record.number(stepped["hypergradient_norm"]),
        "oracle_calls": math.fsum(totals),
    }


def _plain(value: str) -> Value:
    """A flat setting as a number where it is one, else as a recipe has it."""
    try:
        plain = json.loads(value)
    except ValueError:  # of a record that was altered
        return value
    return float(plain) if type(plain) in (int, float) else shown(value)


def _holds(value: Value, sign: str, wanted: str) -> bool:
    if sign == "!=":
        return not _holds(value, "=", wanted)
    number = _number(wanted)
    if isinstance(value, (int, float)) and number is not None:
        return value == number if sign == "=" else _ORDERS[sign](value, number)
    if sign != "=" or value is None:
        return False
    return fnmatchcase(str(value), wanted)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_missing(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _spelled(name: str) -> str:
    """A measure's name as it is typed: `test accuracy` as test_accuracy."""
    return name.replace(" ", "_")


def folders(found: Iterable[Listed]) -> list[RunFolder]:
    """Their folders."""
    return [each.summary.folder for each in found]
