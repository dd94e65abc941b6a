"""Differences from the baseline with their intervals, a panel a regime; the measure along an axis of regimes; what so
many runs come to; and how measures went on the way.

Colours are Okabe and Ito's, which the colour-blind tell apart; shapes and dashes say the same in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from bilevel.sinks import svg
from bilevel.studying.courses import ArmCourse
from bilevel.studying.effort import Replaced
from bilevel.studying.file import BASELINE, OURS, Study
from bilevel.studying.statistics import Interval
from bilevel.studying.summary import ArmRow, Findings, Table

STYLES = {OURS: ("#0072B2", "o", "-"), BASELINE: ("#D55E00", "s", "--")}
"""Colour, shape and dash of a group."""
OTHER = ("0.35", "D", ":")
LINES = (*STYLES.values(), ("#009E73", "^", "-."), OTHER)
"""Of at most four names."""


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(study: Study, found: Findings, folder: Path) -> list[Path]:
    """Write what `composed` gives; returns the paths."""
    made = composed(study, found, folder)
    for path, figure in made.items():
        folder.mkdir(parents=True, exist_ok=True)
        svg.save(figure, path)
    return list(made)


def composed(study: Study, found: Findings, folder: Path) -> dict[Path, Any]:
    """differences.svg, axis.svg, runs.svg and courses.svg in a folder, each where there is something to draw."""
    made = {
        "differences": differences(study, found.regimes),
        "axis": along(study, found.regimes),
        "runs": runs(study, found.replaces),
        "courses": courses(found.courses),
    }
    return {folder / f"{name}.svg": figure for name, figure in made.items() if figure is not None}


def differences(study: Study, tables: Sequence[Table]) -> Any:
    """A panel a regime that has a difference; the arms from above as in the table, margins shaded."""
    shown = [(t, rows) for t in tables if (rows := [row for row in t.rows if row.against.n])]
    if not shown:
        return None
    figure, panels = _panels([0.8 + 0.25 * len(rows) for _, rows in shown])
    for axes, (table, rows) in zip(panels, shown, strict=True):
        margin = study.content.margin
        if margin:
            axes.axvspan(-margin, margin, color="0.9", zorder=0)
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=1)
        for place, row in enumerate(rows):
            _bar(axes, row.against, place, row)
        axes.set_yticks(range(len(rows)), [row.arm for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(f"{table.regime}: difference from {table.named[BASELINE]}", fontsize=9)
        axes.set_xlabel(study.content.measure, fontsize=8)
        axes.tick_params(labelsize=8)
    return figure


def _bar(axes: Any, found: Interval, place: float, row: ArmRow) -> None:
    colour, shape, dash = STYLES.get(row.group, OTHER)
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [place, place], color=colour, linestyle=dash, zorder=2)
    hollow = {"markerfacecolor": "white"} if row.group not in STYLES else {}
    axes.plot([found.mean], [place], color=colour, marker=shape, markersize=5, zorder=3, **hollow)


def along(study: Study, tables: Sequence[Table]) -> Any:
    """The measure of ours and of the baseline over `at` of the regimes that have one, on a logarithmic axis."""
    at = sorted((t for t in tables if t.at is not None), key=lambda t: t.at or 0.0)
    lines: dict[str, list[tuple[float, Interval]]] = {OURS: [], BASELINE: []}
    for table in at:
        for group, points in lines.items():
            for row in table.rows:
                if row.arm == table.named.get(group) and row.seeds:
                    points.append((table.at or 0.0, row.value))
    if max(map(len, lines.values())) < 2:
        return None
    figure, (axes,) = _panels([3.2])
    for group, points in lines.items():
        colour, shape, dash = STYLES[group]
        places, means = [x for x, _ in points], [found.mean for _, found in points]
        known = [(x, f) for x, f in points if f.low is not None and f.high is not None]
        arms = dict.fromkeys(table.named[group] for table in at if group in table.named)
        label = f"{group}: {', '.join(arms)}"
        axes.plot(places, means, color=colour, marker=shape, linestyle=dash, label=label)
        axes.vlines(
            [x for x, _ in known], [f.low for _, f in known], [f.high for _, f in known], colour
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([t.at for t in at], [f"{t.at:g}" for t in at])
    axes.set_xlabel(study.content.axis, fontsize=9)
    axes.set_ylabel(study.content.measure, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def runs(study: Study, found: Replaced | None) -> Any:
    """The expected best of 1, 2, … settings of both arms; thin, that of each development seed."""
    if found is None or not found.efforts:
        return None
    figure, (axes,) = _panels([3.2])
    for effort, style in zip(found.efforts, STYLES.values(), strict=True):
        colour, shape, dash = style
        for curve in effort.by_seed:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=dash, linewidth=0.5)
        places = range(1, len(effort.best) + 1)
        axes.plot(places, effort.best, color=colour, marker=shape, linestyle=dash, label=effort.arm)
    axes.set_xlabel("settings tried", fontsize=9)
    axes.set_ylabel(f"{study.content.measure}, expected best", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def courses(found: Sequence[ArmCourse]) -> Any:
    """A panel an arm: the share of each name on the way, its mean thick and each run thin."""
    shown = [arm for arm in found if arm.ways]
    if not shown:
        return None
    figure, panels = _panels([1.2] * len(shown))
    for axes, arm in zip(panels, shown, strict=True):
        for name, (colour, _, dash) in zip(arm.ways[0].shares, LINES, strict=False):
            for way in arm.ways:
                axes.plot(way.steps, way.shares[name], color=colour, linestyle=dash, linewidth=0.5)
            if len({way.steps for way in arm.ways}) == 1:
                means = [fmean(at) for at in zip(*(w.shares[name] for w in arm.ways), strict=True)]
                axes.plot(arm.ways[0].steps, means, color=colour, linestyle=dash, label=name)
        axes.set_ylim(0, 1)
        axes.set_title(f"{arm.regime}: {arm.arm}", fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel("upper steps", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _panels(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """One below the other, of these heights in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure, list(panels.flatten())
