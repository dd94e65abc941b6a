"""Error against cost, both logarithmic, with the Pareto front; PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bilevel.comparing.table import Row

FLOOR = 1e-16
"""An error of zero is drawn here."""


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Write error-cost.png and .svg into a folder; returns their paths, none without a point."""
    from matplotlib.figure import Figure

    points = [
        (row.calls, max(row.error, FLOOR), row)
        for row in rows
        if row.error is not None and row.calls
    ]
    if not points:
        return []
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    front = sorted((cost, error) for cost, error, row in points if row.is_front)
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", zorder=1)
    for cost, error, row in points:
        axes.scatter(
            cost, error, marker="o" if row.is_front else "x", color="C0" if row.is_front else "0.4"
        )
        axes.annotate(row.label, (cost, error), xytext=(5, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("oracle calls of one estimate (gradients + HVPs + cross products)")
    axes.set_ylabel("relative error of the hypergradient")
    axes.margins(0.15)
    png, svg = folder / "error-cost.png", folder / "error-cost.svg"
    figure.savefig(png, dpi=150)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
