"""A run as columns of numbers, read from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel.errors import RecipeError
from bilevel.runfolder import record

POINTS = 1000
"""Most points a curve is drawn with."""

CALLS = ("gradients", "hvps", "cross_products")
_COLUMNS = {
    "upper_loss": ("upper_loss",),
    "lower_loss": ("lower_loss",),
    "hypergradient_norm": ("hypergradient_norm",),
    "residual": ("estimate", "residual"),
    "condition": ("estimate", "condition"),
    "curvature": ("estimate", "curvature"),
    "error_bound": ("estimate", "error_bound"),
    **{kind: ("totals", kind) for kind in CALLS},
    "sums": ("sent", "calls"),
    "bytes": ("sent", "bytes"),
    "seconds": ("seconds",),
}


@dataclass
class History:
    """What happened in a run; columns have one number a step, NaN where there is none."""

    started: Mapping[str, Any]
    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in _COLUMNS})
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)
    """The problem's measures with x as it began and y trained as long; empty where not taken."""
    error_sources: list[str] = field(default_factory=list)
    """What the bounds and estimates of the error rest on, as `Stats.error_bound_from` says; each once."""
    warnings: list[Mapping[str, Any]] = field(default_factory=list)
    finished: Mapping[str, Any] | None = None

    def points(self, column: str) -> list[tuple[int, float]]:
        """(step, value) of the finite values."""
        pairs = zip(self.steps, self.columns[column], strict=True)
        return [(step, value) for step, value in pairs if math.isfinite(value)]

    def curve(self, column: str) -> list[tuple[int, float]]:
        """(step, value) of the finite values, thinned evenly to at most `POINTS` and the last."""
        finite = self.points(column)
        thinned = finite[:: max(1, math.ceil(len(finite) / POINTS))]
        return thinned if thinned[-1:] == finite[-1:] else [*thinned, finite[-1]]

    def metric(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one of the problem's measures."""
        values = ((step, metrics.get(name, math.nan)) for step, metrics in self.evaluations)
        return [(step, value) for step, value in values if math.isfinite(value)]

    @property
    def metrics(self) -> list[str]:
        """The names of the problem's measures."""
        return list(dict.fromkeys(name for _, metrics in self.evaluations for name in metrics))

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """The measures that were taken at the last step; empty where none were."""
        at, metrics = self.evaluations[-1] if self.evaluations else (0, {})
        return metrics if at and at == (self.steps or [0])[-1] else {}

    @property
    def calls(self) -> dict[int, float]:
        """All oracle calls so far, by step; none before the first."""
        counts = zip(*(self.columns[kind] for kind in CALLS), strict=True)
        return {0: 0.0} | dict(zip(self.steps, map(math.fsum, counts), strict=True))

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return math.fsum(self.columns["seconds"])


def read(folder: Path) -> History:
    """The history in a run folder. Raises `RecipeError` where nothing is recorded."""
    history: History | None = None
    for event in record.read(folder):
        kind = event["event"]
        if kind == "started":
            history = History(event)
        elif history is None:
            continue
        elif kind == "stepped":
            _add_step(history, event)
        elif kind == "evaluated":
            metrics = {name: record.number(v) for name, v in event["metrics"].items()}
            history.evaluations.append((event["step"], metrics))
        elif kind == "held":
            history.held = {name: record.number(v) for name, v in event["metrics"].items()}
        elif kind == "warned":
            history.warnings.append(event)
        elif kind == "finished":
            history.finished = event
    if history is None:
        raise RecipeError(
            f"{folder}: nothing is recorded in {record.FILE}; the run ended before its first "
            "step, or its recipe has no sink jsonl"
        )
    return history


def _add_step(history: History, event: Mapping[str, Any]) -> None:
    history.steps.append(event["step"])
    for column, path in _COLUMNS.items():
        value: Any = event
        for key in path:
            # a record of an older version may lack a statistic, one of one rank what was sent
            value = None if value is None else value.get(key)
        history.columns[column].append(record.number(value))
    source = event["estimate"].get("error_bound_from")
    if source and source not in history.error_sources:
        history.error_sources.append(source)
