"""What is kept of each cell: a JSON file of a few kB, whole or not there, by which no cell is computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from bilevel.errors import CheckpointError
from bilevel.runfolder import record
from bilevel.runfolder.files import parse, write_text
from bilevel.studying.file import Cases

REMEDY = "make room; what is done is kept"
LOSSES = ("upper_loss", "lower_loss")
"""Measures that every step says, whatever the problem's own are."""
Phase = Literal["tune", "test"]


@dataclass(frozen=True)
class StudyCell:
    """One run: an arm in a regime at a seed, of a setting that is tried or of a mixture."""

    regime: str
    arm: str
    phase: Phase
    seed: int
    trial: int | None = None
    point: int | None = None

    @property
    def name(self) -> str:
        trial = "" if self.trial is None else f"-trial{self.trial:02d}"
        point = "" if self.point is None else f"-point{self.point:02d}"
        return f"{self.phase}{trial}-seed{self.seed}{point}"

    def __str__(self) -> str:
        return f"{self.regime}/{self.arm}/{self.name}"


@dataclass(frozen=True)
class Kept:
    """A cell that is over."""

    status: str
    """done or failed."""
    assignments: tuple[str, ...]
    """The overrides of the recipe that it was run with."""
    measures: Mapping[str, float]
    totals: Mapping[str, float]
    """Gradients, products and evaluations, as a run counts them."""
    seconds: float
    reason: str | None = None
    note: str | None = None
    """Why it would not have been run, had it not been asked for all the same."""
    arithmetic: str | None = None
    """What it was computed with, as `bilevel.runfolder.arithmetic.here` says it; None of a cell of an earlier version."""
    course: Mapping[str, Sequence[float]] | None = None
    """Columns `step` and measures, a row an evaluation."""
    cases: Mapping[str, Sequence[Any]] | None = None
    """Columns unit, score and label of the answers that the measure was computed from."""

    @property
    def is_done(self) -> bool:
        return self.status == "done"


@dataclass
class Book:
    """The kept cells of a study, read when they are asked for."""

    folder: Path
    _read: dict[StudyCell, Kept] = field(default_factory=dict)

    def path(self, cell: StudyCell) -> Path:
        return self.folder / cell.regime / cell.arm / f"{cell.name}.json"

    def get(self, cell: StudyCell) -> Kept | None:
        """None where the cell is not over. Raises `CheckpointError` where its file is damaged."""
        if cell not in self._read:
            path = self.path(cell)
            if not path.is_file():
                return None
            try:
                found = parse(path.read_bytes())
                found["assignments"] = tuple(found["assignments"])
                for part in ("measures", "totals"):
                    found[part] = {k: record.number(v) for k, v in found[part].items()}
                self._read[cell] = Kept(**found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path}: is not the result of a cell ({error}); put it back as it was, or delete it "
                    "to have the cell computed again"
                ) from error
        return self._read[cell]

    def keep(self, cell: StudyCell, kept: Kept) -> Path:
        """Write a cell's file, a line each part."""
        parts = {k: v for k, v in asdict(kept).items() if v is not None}
        lines = [record.line({key: value}).strip()[1:-1] for key, value in parts.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        path = self.path(cell)
        write_text(path, text, remedy=REMEDY, make_folder=True)
        return path

    def drop(self, cell: StudyCell) -> None:
        """Take a cell's file away, so that it is computed again."""
        self.path(cell).unlink(missing_ok=True)
        self._read.pop(cell, None)


def collect(
    folder: Path,
    measure: str,
    keep: Sequence[str],
    cases: Cases | None,
    course: Sequence[str] = (),
) -> Kept:
    """What is kept of a run that is over, from its record and rows; `assignments` are left to the caller.

    Raises `ValueError` where the measure is not a number, or the table has not what is asked of it.
    """
    stepped = record.last(folder, "stepped") or {}
    evaluated = (record.last(folder, "evaluated") or {"metrics": {}})["metrics"]
    finished = record.last(folder, "finished") or {}
    found = {name: stepped[name] for name in LOSSES if name in stepped}
    found |= {
        n: v for n, v in evaluated.items() if any(fnmatchcase(n, k) for k in (measure, *keep))
    }
    if measure not in found:
        known = ", ".join([*LOSSES, *sorted(evaluated)])
        raise ValueError(f"measure {measure!r}: the run has none of that name; it has {known}")
    numbers = {name: record.number(value) for name, value in found.items()}
    if not abs(numbers[measure]) < float("inf"):
        raise ValueError(f"{measure} is {numbers[measure]} at the end of the run")
    return Kept(
        "done",
        (),
        {name: float(f"{value:.7g}") for name, value in numbers.items()},
        stepped.get("totals", {}),
        round(float(finished.get("seconds", 0.0)), 2),
        course=_course(folder, course) if course else None,
        cases=_cases(folder, cases) if cases else None,
    )


def _course(folder: Path, patterns: Sequence[str]) -> dict[str, list[float]]:
    """Of the measures that every evaluation has. Raises `ValueError` where there is none such, or one is below 0."""
    events = [event for event in record.read(folder) if event["event"] == "evaluated"]
    names = [
        name
        for name in (events[0]["metrics"] if events else ())
        if any(fnmatchcase(name, each) for each in patterns)
        and all(name in event["metrics"] for event in events)
    ]
    if not names:
        raise ValueError(f"course: the run has no measure {' or '.join(patterns)}")
    found = {name: [record.number(e["metrics"][name]) for e in events] for name in names}
    for name, values in found.items():
        if not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"course: {name} is not a weight: {min(values)} to {max(values)}")
    return {"step": [event["step"] for event in events]} | {
        name: [float(f"{value:.5g}") for value in values] for name, values in found.items()
    }


def _cases(folder: Path, cases: Cases) -> dict[str, list[Any]]:
    """Numbers of units in order of appearance, scores to five digits, labels as 0 and 1."""
    path = folder / "rows" / f"{cases.table}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"cases: the run has no table {cases.table!r}; the recipe's sinks need rows"
        )
    units: dict[Any, int] = {}
    found: dict[str, list[Any]] = {"unit": [], "score": []} | ({"label": []} if cases.label else {})
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if any(row.get(key) != value for key, value in cases.where.items()):
            continue
        lacking = [k for k in (cases.unit, cases.score, cases.label) if k and k not in row]
        if lacking:
            raise ValueError(
                f"cases: table {cases.table} has no column {lacking[0]!r}; it has {', '.join(row)}"
            )
        found["unit"].append(units.setdefault(row[cases.unit], len(units)))
        found["score"].append(float(f"{record.number(row[cases.score]):.5g}"))
        if cases.label:
            found["label"].append(int(bool(row[cases.label])))
    if not units:
        raise ValueError(f"cases: no row of table {cases.table} is where {cases.where}")
    return found
