"""Pictures of what `make benchmark` keeps: ratios over its runs, and growth with each size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from docs.pictures.keep import Picture
from docs.pictures.style import BLUE, CYCLE, DASHES, INK, MARKS, ORANGE, PALE, canvas

KEPT = Path(__file__).parent.parent / "benchmarks"
LAST = 40
"""Runs that are drawn; the file has all of them."""


def ratios() -> dict[str, Any]:
    """{row: {"floor", "peer": [(run, ratio)]}}, and the commits of the runs."""
    lines = (KEPT / "history.jsonl").read_text("utf-8").splitlines()[-LAST:]
    runs = [json.loads(line) for line in lines]
    rows: dict[str, Any] = {}
    for k, run in enumerate(runs):
        for row, found in run["rows"].items():
            for kind in ("floor", "peer"):
                if kind in found:
                    rows.setdefault(row, {}).setdefault(kind, []).append([k, found[kind]])
    names = [f"{run['date']} {run['commit'][:7]}" for run in runs]
    return {"runs": names, "rows": rows}


LINES = {
    "floor": ("to plain torch by hand (start-up: to import torch)", BLUE, "-", "o"),
    "peer": ("to the best peer", ORANGE, (0, (4, 1.5)), "s"),
}


def draw_ratios(data: dict[str, Any]) -> Figure:
    """A panel a row, the ratio on a logarithmic axis, its last value written beside it."""
    rows, runs, columns = data["rows"], data["runs"], 4
    lines = math.ceil(len(rows) / columns)
    with canvas(7.6, 0.5 + 1.3 * lines) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for k, (axes, (row, found)) in enumerate(zip(grid, rows.items(), strict=False)):
            _panel(axes, row, found, len(runs))
            if k + columns >= len(rows):  # the lowest of its column
                ends = sorted({0, len(runs) - 1})
                axes.set_xticks(ends, [runs[end][5:10] for end in ends], fontsize=7.5)
        for axes in grid[len(rows) :]:
            axes.set_visible(False)
        shown = dict(zip(*reversed(_legend(grid)), strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2)
        return figure


def _panel(axes: Any, row: str, found: dict[str, Any], runs: int) -> None:
    every = [value for points in found.values() for _, value in points]
    low, high = min(*every, 0.8) / 1.3, max(*every, 1.25) * 1.3
    ends = {kind: points[-1][1] for kind, points in found.items()}
    are_near = max(ends.values()) / min(ends.values()) < (high / low) ** 0.2
    for kind, points in found.items():
        label, color, dash, mark = LINES[kind]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linestyle=dash, marker=mark, markersize=3.5, label=label)
        is_below = are_near and kind != max(
            ends, key=ends.__getitem__
        )  # or one would hide the other
        off, side = (-1, "top") if is_below else (1, "bottom")
        words = {"textcoords": "offset points", "fontsize": 7.5, "va": side, "color": color}
        axes.annotate(f"{ys[-1]:.2g}", (xs[-1], ys[-1]), (4, off), **words)
    axes.axhline(1, color=PALE, linewidth=1)
    axes.set(title=row, yscale="log", xlim=(-0.5, runs - 0.5 + 0.15 * runs), ylim=(low, high))
    ticks = [t for t in TICKS if low <= t <= high]
    ticks = ticks if len(ticks) < 5 else [t for t in ticks if f"{t:g}".strip("0.") == "1"]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks([])


TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    handles, labels = [], []
    for axes in grid:
        one, two = axes.get_legend_handles_labels()
        handles, labels = handles + one, labels + two
    return handles, labels


SIZES = {"x": "dim x", "y": "dim y", "K": "steps K", "tasks": "tasks", "batch": "batch"}
QUANTITIES = {
    "work": "elements written",
    "memory": "bytes alive at the peak",
    "seconds": "CPU seconds",
}


def growth() -> dict[str, Any]:
    return json.loads((KEPT / "growth.json").read_text("utf-8"))["axes"]


def draw_growth(data: dict[str, Any]) -> Figure:
    """A column a size, a line a quantity; a dotted line in each panel has slope 1."""
    with canvas(8.6, 6.2) as figure:
        grid = figure.subplots(len(QUANTITIES), len(SIZES), sharex="col", sharey="row")
        for column, (axis, title) in enumerate(SIZES.items()):
            ns, curves = data[axis]["sizes"], data[axis]["curves"]
            for line, (kind, label) in enumerate(QUANTITIES.items()):
                axes = grid[line][column]
                for k, (name, found) in enumerate(curves.items()):
                    look = {"color": CYCLE[k], "linestyle": DASHES[k], "marker": MARKS[k]}
                    axes.plot(ns, found[kind], label=name, markersize=3.5, linewidth=1.3, **look)
                axes.set(xscale="log", yscale="log")
                axes.xaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_minor_locator(NullLocator())
                lowest = min(found[kind][0] for found in curves.values())
                guide = [0.6 * lowest * n / ns[0] for n in ns]
                axes.plot(ns, guide, ":", color=INK, linewidth=1, label="slope 1")
                if not column:
                    axes.set_ylabel(label)
                if not line:
                    axes.set_title(title)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
        return figure


PICTURES = {
    "benchmark_history": Picture("Ratios over the runs of the benchmark", ratios, draw_ratios),
    "growth": Picture("Work and memory against each size", growth, draw_growth),
}
