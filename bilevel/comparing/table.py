"""What the cells add up to: a row an estimator, ranked, and the Pareto front of error and cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """Medians over the seeds at which an estimator did not fail; None where there is no number."""

    label: str
    rank: int | None
    error: float | None
    """Relative, along the run, with the lower level solved tightly at each point."""
    cosine: float | None
    trained: float | None
    """The same at the trained point alone."""
    in_run: float | None
    """Relative error after the recipe's own lower solve, along the run."""
    warm: float | None
    """As `error`, with the state that it left at the point before; the first point is left out."""
    seconds: float | None
    memory: float | None
    """Bytes."""
    gradients: float | None
    hvps: float | None
    cross_products: float | None
    upper_loss: float | None
    """F where a run with the budget ends."""
    tolerance: float
    """Errors below this are not told apart: the reference is no better."""
    failures: tuple[str, ...]
    """`seed N: reason` or `seeds N, M: reason`."""
    has_state: bool = False
    """Whether `warm` is not its `error` at the same points, by more than a tenth."""
    is_front: bool = False
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest of what a seed's median is: error, in_run, seconds, upper_loss."""

    @property
    def calls(self) -> float | None:
        """Oracle calls of one estimate."""
        parts = (self.gradients, self.hvps, self.cross_products)
        return None if None in parts else sum(part for part in parts if part is not None)


Results = Sequence[tuple[str, int, Mapping[str, Any]]]
"""(label, seed, result of the cell)."""


def rows(results: Results, tolerance: float) -> list[Row]:
    """Ranked by error, then by HVPs; those without an error last."""
    labels = dict.fromkeys(label for label, _, _ in results)
    found = [
        _row(label, [(s, r) for name, s, r in results if name == label], tolerance)
        for label in labels
    ]
    found.sort(key=_key)
    ranks: dict[tuple[float, float], int] = {}
    for place, row in enumerate(found, 1):
        ranks.setdefault(_key(row), place)
    costs = {
        r.label: (r.calls, max(r.error, tolerance))
        for r in found
        if r.calls is not None and r.error is not None
    }
    front = pareto(costs)
    return [
        replace(
            row,
            rank=None if row.error is None else ranks[_key(row)],
            is_front=row.label in front,
        )
        for row in found
    ]


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The labels of (cost, error) for which no other point is as good in both and better in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return {
        label
        for label, point in points.items()
        if not any(beats(other, point) for other in points.values())
    }


def _key(row: Row) -> tuple[float, float]:
    if row.error is None:
        return math.inf, math.inf if row.hvps is None else row.hvps
    return max(row.error, row.tolerance), row.hvps or 0.0


def _row(label: str, found: Sequence[tuple[int, Mapping[str, Any]]], tolerance: float) -> Row:
    results = [result for _, result in found]
    cost = [result["estimate"] for result in results if "estimate" in result]
    runs = [result["run"] for result in results if "run" in result]
    along = [result["along"] for result in results if "along" in result]
    points = [point for run in along for point in run]
    return Row(
        label=label,
        rank=None,
        error=_median(point["error"] for point in points),
        cosine=_median(point["cosine"] for point in points),
        trained=_median(run[-1]["error"] for run in along),
        in_run=_median(point["error_in_run"] for point in points),
        warm=_median(point.get("error_warm") for point in points),
        seconds=_median(part["seconds"] for part in cost),
        memory=_median(part["memory"] for part in cost),
        gradients=_median(part["gradients"] for part in cost),
        hvps=_median(part["hvps"] for part in cost),
        cross_products=_median(part["cross_products"] for part in cost),
        upper_loss=_median(part["upper_loss"] for part in runs),
        tolerance=tolerance,
        failures=_failures(found),
        has_state=any(_differs(point, tolerance) for point in points),
        spread=_spread(
            error=[_median(point["error"] for point in run) for run in along],
            in_run=[_median(point["error_in_run"] for point in run) for run in along],
            seconds=[part["seconds"] for part in cost],
            upper_loss=[part["upper_loss"] for part in runs],
        ),
    )


def _spread(**values: Sequence[float | None]) -> dict[str, tuple[float, float]]:
    known = {key: [one for one in each if one is not None] for key, each in values.items()}
    return {key: (min(each), max(each)) for key, each in known.items() if len(each) > 1}


def _failures(found: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Each reason once, with the seeds it stopped."""
    seeds: dict[str, list[int]] = {}
    for seed, result in found:
        if result["status"] != "ok":
            seeds.setdefault(str(result["reason"]), []).append(seed)
    return tuple(
        f"seed{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}: {reason}"
        for reason, at in seeds.items()
    )


def _differs(point: Mapping[str, Any], tolerance: float) -> bool:
    cold, warm = point["error"], point.get("error_warm")
    if cold is None or warm is None:
        return False
    cold, warm = max(cold, tolerance), max(warm, tolerance)
    return abs(warm - cold) > 0.1 * cold


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
