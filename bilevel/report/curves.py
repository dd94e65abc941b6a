"""Curves of arms: means over seeds with a band, over upper steps and over oracle calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.report import seeds
from bilevel.report.arms import Arm, Run
from bilevel.report.charts import DECADES, HEIGHT, WIDTH
from bilevel.report.seeds import Mean

MOST_ARMS = 12
"""Arms whose curves can be told apart."""
ROWS = 24_000
"""Points of all curves of a page together: at some 35 bytes each it stays below 3 MB."""
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d")
DASHES = ((), (5, 3))
AXES = {"steps": "upper step", "calls": "oracle calls: gradients + HVPs + cross products"}
_LOSSES = {
    "upper_loss": ("Upper loss F", "before each upper step"),
    "lower_loss": ("Lower loss G", "at the end of each lower solve"),
    "hypergradient_norm": ("Hypergradient norm", "‖dΦ/dx‖ as estimated"),
    "residual": ("Adjoint residual", "‖b − A v‖ / ‖b‖ where the linear solve ended"),
}


@dataclass(frozen=True)
class Pair:
    """One quantity over upper steps and over oracle calls."""

    title: str
    note: str
    steps: dict[str, Any]
    calls: dict[str, Any]


def pairs(arms: Sequence[Arm]) -> list[Pair]:
    """Losses, hypergradient, adjoint and the problem's measures; what no run has is left out."""
    drawn = list(_quantities(arms))
    most = max(12, min(200, ROWS // (2 * max(1, len(arms) * len(drawn)))))
    return [
        Pair(title, note, *(_spec(arms, axis, curve, most) for axis in AXES))
        for title, note, curve in drawn
    ]


def strokes(count: int) -> list[tuple[str, tuple[int, ...]]]:
    """(colour, dash) of each arm."""
    return [(COLORS[n % len(COLORS)], DASHES[n // len(COLORS) % 2]) for n in range(count)]


_CurveOf = Callable[[Run], list[tuple[int, float]]]


def _quantities(arms: Sequence[Arm]) -> Iterator[tuple[str, str, _CurveOf]]:
    runs = [run for arm in arms for run in arm.runs]
    for column, (title, note) in _LOSSES.items():
        if any(run.history.points(column) for run in runs):
            yield title, note, lambda run, column=column: run.history.points(column)
    for name in dict.fromkeys(name for run in runs for name in run.history.metrics):
        if any(len(run.history.metric(name)) > 1 for run in runs):
            yield name, "", lambda run, name=name: run.history.metric(name)


def _spec(arms: Sequence[Arm], axis: str, curve: _CurveOf, most: int) -> dict[str, Any]:
    means = [seeds.thinned(_means(arm, axis, curve), most) for arm in arms]
    found = [each for points in means for _, each in points]
    values = [each.mean for each in found]
    is_log = bool(values) and min(values) > 0 and max(values) / min(values) > DECADES
    floor = min(values) / 2 if is_log else None
    lines = ["arm,x,mean,low,high,n"]
    for n, points in enumerate(means):
        lines += [f"{n},{x:.9g},{_row(each, floor)}" for x, each in points]
    return _chart("\n".join(lines), [arm.name for arm in arms], axis, is_log, len(values) < 40)


def _means(arm: Arm, axis: str, curve: _CurveOf) -> list[tuple[float, Mean]]:
    curves = [curve(run) for run in arm.runs]
    if not all(curves):
        return []
    if axis == "steps":
        return seeds.over_steps(curves)
    calls = [run.history.calls for run in arm.runs]
    return seeds.over_calls(
        [
            [(of[step], value) for step, value in points if step in of]
            for of, points in zip(calls, curves, strict=True)
        ]
    )


def _row(found: Mean, floor: float | None) -> str:
    """mean,low,high,n; a band that a logarithmic scale cannot draw is cut at `floor`."""
    half = found.half or 0.0
    low = found.mean - half if floor is None else max(found.mean - half, min(floor, found.mean))
    numbers = (f"{value:.5g}" for value in (found.mean, low, found.mean + half))
    return ",".join([*numbers, str(found.n)])


def _chart(
    data: str, names: Sequence[str], axis: str, is_log: bool, with_points: bool
) -> dict[str, Any]:
    """Vega-Lite, written out: altair, which makes the charts of one run, checks each for 0.1 s."""
    colors, dashes = zip(*strokes(len(names)), strict=True)
    arms = [str(n) for n in range(len(names))]
    numbers = dict.fromkeys(("x", "mean", "low", "high", "n"), "number")
    format_ = {"format": ".0e" if is_log else ".6~g", "title": None, "tickCount": 5}
    scale = {"type": "log"} if is_log else {"zero": False}
    x_axis = {"title": AXES[axis], "tickCount": 5, "format": "~s"}
    x = {"field": "x", "type": "quantitative", "axis": x_axis}
    arm = {"field": "arm", "type": "nominal", "legend": None}
    color = arm | {"scale": {"domain": arms, "range": list(colors)}}
    dash = arm | {"scale": {"domain": arms, "range": [list(each) for each in dashes]}}
    y = {"type": "quantitative", "axis": format_, "scale": scale}
    told = [{"field": "name", "type": "nominal", "title": "arm"}]
    told += [{"field": "x", "type": "quantitative", "title": AXES[axis].partition(":")[0]}]
    told += [
        {"field": part, "type": "quantitative", "format": ".5g"} for part in ("mean", "low", "high")
    ]
    told += [{"field": "n", "type": "quantitative", "title": "seeds"}]
    band = {
        "mark": {"type": "area", "opacity": 0.2 if len(names) <= 4 else 0.1},
        "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    line = {
        "transform": [{"lookup": "arm", "from": _lookup(names)}],
        "mark": {"type": "line", "strokeWidth": 1.8, "point": with_points},
        "encoding": {"x": x, "y": y | {"field": "mean"}, "color": color}
        | {"strokeDash": dash, "tooltip": told},
    }
    return {
        "data": {"values": data, "format": {"type": "csv", "parse": numbers}},
        "layer": [band, line],
        "width": WIDTH,
        "height": HEIGHT,
        "config": {
            "view": {"stroke": None},
            "axis": {"gridColor": "#e8e8e8", "labelColor": "#555", "titleColor": "#555"},
        },
    }


def _lookup(names: Sequence[str]) -> dict[str, Any]:
    rows = [{"arm": str(n), "name": name} for n, name in enumerate(names)]
    return {"data": {"values": rows}, "key": "arm", "fields": ["name"]}
