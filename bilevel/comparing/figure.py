"""Error against cost, both logarithmic, with the Pareto front; PNG and SVG.

Errors below what the reference can tell are drawn at one height, in a zone that says so.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bilevel.comparing.labels import place
from bilevel.comparing.table import Row
from bilevel.sinks import svg

FLOOR = 1e-16
"""An error of zero is drawn here where the reference has no tolerance."""
_FRONT, _OTHER = "C0", "0.45"


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Write error-cost.png and .svg into a folder; returns their paths, none without a point."""
    figure = compose(rows, title)
    if figure is None:
        return []
    png, drawing = folder / "error-cost.png", folder / "error-cost.svg"
    figure.savefig(png, dpi=150)
    svg.save(figure, drawing)
    return [png, drawing]


def compose(rows: Sequence[Row], title: str) -> Any:
    """The `matplotlib.figure.Figure`, or None without a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(row.calls, _height(row), row) for row in rows if row.error is not None and row.calls]
    if not points:
        return None
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("oracle calls of one estimate (gradients + HVPs + cross products)")
    axes.set_ylabel("relative error of the hypergradient, cold")
    _limits(axes, points)
    _zone(axes, max(row.tolerance for row in rows))
    front = _front(axes, points)
    for is_front, marker, color, name in (
        (True, "o", _FRONT, "on the Pareto front"),
        (False, "X", _OTHER, "another is as good for less, or better for as much"),
    ):
        chosen = [(cost, error) for cost, error, row in points if row.is_front is is_front]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=marker, color=color, label=name, s=40)
    _ticks(axes)
    _legend(figure, axes, rows)
    figure.draw_without_rendering()  # the layout, which labels are placed in
    figure.set_layout_engine("none")
    place(axes, [(cost, error, row.label) for cost, error, row in points], front)
    return figure


def _height(row: Row) -> float:
    """Errors that the reference does not tell apart are at one height."""
    assert row.error is not None
    if row.error < row.tolerance:
        return row.tolerance / 3
    return max(row.error, FLOOR)


def _limits(axes: Any, points: Sequence[tuple[float, float, Row]]) -> None:
    """A margin of a sixth of what is spanned, a factor of 1.6 to either side at least."""
    for values, limit in (
        ([cost for cost, _, _ in points], axes.set_xlim),
        ([error for _, error, _ in points], axes.set_ylim),
    ):
        low, high = min(values), max(values)
        factor = max(1.6, (high / low) ** (1 / 6))
        limit(low / factor, high * factor)


def _zone(axes: Any, tolerance: float) -> None:
    low, _ = axes.get_ylim()
    if low < tolerance:
        name = f"below {tolerance:.1g}: the reference tells no two apart"
        axes.axhspan(low, tolerance, color="0.92", zorder=0, label=name)


def _front(axes: Any, points: Sequence[tuple[float, float, Row]]) -> list[tuple[float, float]]:
    """The staircase: the least error that can be had for at most so many calls."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted((cost, error) for cost, error, row in points if row.is_front):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    costs = [best[0][0], *(cost for cost, _ in best), right]
    errors = [top, *(error for _, error in best), best[-1][1]]
    corners = [(costs[0], errors[0])]
    for cost, error in zip(costs[1:], errors[1:], strict=True):
        corners += [(cost, corners[-1][1]), (cost, error)]
    axes.plot(*zip(*corners, strict=True), color=_FRONT, alpha=0.6, zorder=1, label="Pareto front")
    return corners


def _ticks(axes: Any) -> None:
    """Powers of ten; where few are spanned, 2 and 5 times these too. Calls in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_minor_formatter(NullFormatter())
        is_narrow = math.log10(high / low) < 2.3
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,), numticks=9))
        if is_narrow or axis is axes.xaxis:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles, names = axes.get_legend_handles_labels()
    failed = [row.label for row in rows if row.failures]
    if failed:
        handles.append(Line2D([], [], linestyle=""))
        names.append("\n".join(textwrap.wrap(f"failed: {', '.join(failed)}", 80)))
    figure.legend(
        handles, names, loc="outside lower left", fontsize="small", ncols=2, frameon=False
    )
