"""The measure against trials, with the best so far, and against each setting; PNG and SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bilevel.sinks import svg
from bilevel.sweeping.request import Request
from bilevel.sweeping.result import Trial, short
from bilevel.sweeping.space import Dimension, Range

MOST = 5
"""Settings that are drawn, the most important first."""
_DONE, _PRUNED, _BEST = "C0", "0.6", "C3"


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(
    request: Request, found: Sequence[Trial], importance: Mapping[str, float], folder: Path
) -> list[Path]:
    """Write sweep.png and sweep.svg; returns their paths, none without a trial that is done."""
    figure = compose(request, found, importance)
    if figure is None:
        return []
    png, drawing = folder / "sweep.png", folder / "sweep.svg"
    figure.savefig(png, dpi=150)
    svg.save(figure, drawing)
    return [png, drawing]


def compose(request: Request, found: Sequence[Trial], importance: Mapping[str, float]) -> Any:
    """The `matplotlib.figure.Figure`, or None without a trial that is done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in found if row.status == "done"]
    if not done:
        return None
    shown = sorted(request.space, key=lambda each: -importance.get(each.key, 0.0))[:MOST]
    columns = min(3, 1 + len(shown))
    lines = math.ceil((1 + len(shown)) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    is_log = _spans(done)
    _trials(panels[0], request, found)
    names = short([each.key for each in request.space])
    for axes, each in zip(panels[1:], shown, strict=False):
        _setting(axes, each, found, names[each.key], importance.get(each.key))
    for axes in panels[1 + len(shown) :]:
        axes.set_axis_off()
    for index, axes in enumerate(panels):
        if is_log:
            axes.set_yscale("log")
        if index % columns == 0:
            axes.set_ylabel(request.measure)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize="small"
    )
    return figure


def _spans(done: Sequence[Trial]) -> bool:
    """Whether the values are above 0 and a hundredfold apart, so that their logarithm is drawn."""
    values = [row.value for row in done if row.value is not None]
    return min(values) > 0 and max(values) / min(values) > 100


def _trials(axes: Any, request: Request, found: Sequence[Trial]) -> None:
    done = sorted((row for row in found if row.status == "done"), key=lambda row: row.number)
    pruned = [row for row in found if row.status == "pruned" and row.value is not None]
    numbers, values = [row.number for row in done], [row.value for row in done]
    each = [(row.number, value) for row in done for value in row.seeds if len(row.seeds) > 1]
    if each:
        axes.scatter(*zip(*each, strict=True), s=8, color=_DONE, alpha=0.4, label="its seeds")
    axes.scatter(numbers, values, s=24, color=_DONE, label="a trial")
    if pruned:
        at = [row.number for row in pruned], [row.value for row in pruned]
        axes.scatter(*at, marker="x", s=18, color=_PRUNED, label="pruned, where it stood")
    known = [value for value in values if value is not None]
    so_far = list(itertools.accumulate(known, max if request.maximize else min))
    axes.step(numbers, so_far, where="post", color=_BEST, lw=1.2, label="best so far")
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _setting(
    axes: Any, each: Dimension, found: Sequence[Trial], name: str, share: float | None
) -> None:
    from matplotlib.ticker import NullFormatter

    for status, marker, color in (("pruned", "x", _PRUNED), ("done", "o", _DONE)):
        chosen = [row for row in found if row.status == status and row.value is not None]
        if isinstance(each, Range):
            at = [row.values[each.key] for row in chosen]
        else:
            at = [each.values.index(row.values[each.key]) for row in chosen]
        axes.scatter(at, [row.value for row in chosen], marker=marker, s=18, color=color)
    if isinstance(each, Range):
        axes.set_xscale("log" if each.is_log else "linear")
        margin = (each.high / each.low) ** 0.05 if each.is_log else 0.05 * (each.high - each.low)
        low, high = (
            (each.low / margin, each.high * margin)
            if each.is_log
            else (each.low - margin, each.high + margin)
        )
        axes.set_xlim(low, high)
        if each.is_log and each.high >= 10 * each.low:
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        labels = [value if len(value) < 18 else f"{value[:16]}…" for value in each.values]
        axes.set_xticks(range(len(labels)), labels, rotation=20 if len(labels) > 2 else 0)
        axes.margins(x=0.2)
    axes.set_xlabel(name)
    if share is not None:
        axes.set_title(f"importance {share:.2f}", fontsize="small")
