"""The charts of a report as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair

from bilevel.report.history import History
from bilevel.sinks.numbers import relation

WIDTH, HEIGHT = 400, 200
DECADES = 100
"""A curve alone that spans more than this factor is drawn on a logarithmic scale."""

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """A chart with its caption."""

    title: str
    note: str
    spec: dict[str, Any]


def charts(history: History) -> list[Chart]:
    """Losses, hypergradient, adjoint, oracle calls, what was sent; a chart without numbers is left out."""
    one = history.curve
    planned = [
        ("Upper loss F", "before each upper step", {"F": one("upper_loss")}),
        ("Lower loss G", "at the end of each lower solve", {"G": one("lower_loss")}),
        (
            "Hypergradient norm",
            "‖dΦ/dx‖ as estimated",
            {"norm": one("hypergradient_norm")},
        ),
        (
            "Adjoint residual",
            "‖b − A v‖ / ‖b‖ where the linear solve ended",
            {"residual": one("residual")},
        ),
        (
            "Error of the hypergradient",
            f"in the units of dΦ/dx; {error_legend(history.error_sources)}",
            {"error": one("error_bound")},
        ),
        (
            "Condition of the lower Hessian",
            "a lower bound, from Ritz values",
            {"condition": one("condition")},
        ),
        (
            "Curvature of the lower Hessian",
            "smallest pᵀA p / pᵀp met; not positive definite at or below the line at 0",
            {"curvature": one("curvature")},
        ),
        (
            "Oracle calls",
            "since the start, both levels together",
            {
                "gradients": one("gradients"),
                "HVPs": one("hvps"),
                "cross products": one("cross_products"),
            },
        ),
        (
            "Sent by each rank",
            "MB a step, of what was summed over ranks",
            {"MB": [(step, sent / 1e6) for step, sent in one("bytes")]},
        ),
    ]
    return [
        Chart(title, note, _spec(curves)) for title, note, curves in planned if any(curves.values())
    ]


def error_legend(sources: Sequence[str]) -> str:
    """What the numbers that stand for the error are: "≤ a bound", "~ an estimate", from what."""
    kinds = {"≤": "a bound", "~": "an estimate, which the error may exceed"}
    said = [f"{relation(source)} {kinds[relation(source)]} (from: {source})" for source in sources]
    return "; ".join(said) or f"~ {kinds['~']}"


def metric_charts(history: History) -> list[Chart]:
    """One chart for each of the problem's measures that was taken more than twice."""
    curves = {name: history.metric(name) for name in history.metrics}
    return [
        Chart(name, "", _spec({name: curve}, points=True))
        for name, curve in curves.items()
        if len(curve) > 2
    ]


def _spec(curves: dict[str, Curve], points: bool = False) -> dict[str, Any]:
    rows = [
        {"step": step, "value": value, "curve": name}
        for name, curve in curves.items()
        for step, value in curve
    ]
    values = [row["value"] for row in rows]
    low = min(values)
    is_log = len(curves) == 1 and low > 0 and max(values) / low > DECADES
    scale = altair.Scale(type="log") if is_log else altair.Scale(zero=False)
    axis = altair.Axis(format=".0e" if is_log else ".6~g", title=None, tickCount=5)
    y = altair.Y("value:Q", axis=axis, scale=scale)
    x = altair.X("step:Q", axis=altair.Axis(title="upper step", tickCount=5, format="d"))
    chart = altair.Chart(altair.Data(values=rows)).mark_line(strokeWidth=1.6, point=points)
    tooltip = ["curve:N", "step:Q", altair.Tooltip("value:Q", format=".5g")]
    if len(curves) > 1:
        legend = altair.Legend(title=None, orient="top")
        color = altair.Color("curve:N", sort=list(curves), legend=legend)
        chart = chart.encode(x=x, y=y, color=color, tooltip=tooltip)
    else:
        chart = chart.encode(x=x, y=y, tooltip=tooltip)
    if not is_log and low <= 0 and "curvature" in curves:
        zero = altair.Chart(altair.Data(values=[{"zero": 0}])).mark_rule(color="#c00")
        chart = chart + zero.encode(y="zero:Q")
    sized = chart.properties(width=WIDTH, height=HEIGHT).configure_view(stroke=None)
    return sized.configure_axis(gridColor="#e8e8e8", labelColor="#555", titleColor="#555").to_dict()
