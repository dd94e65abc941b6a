"""Curves on two axes: how every picture of a family of estimators is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from docs.pictures.keep import Picture
from docs.pictures.style import CYCLE, DASHES, MARKS, PALE, canvas

Curves = dict[str, list[tuple[float, float]]]
"""Points (x, y) of each method by the name in the legend."""

FLOOR = 1e-14
"""An error below this is drawn here: it is rounding."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of curves: `computed` returns them, `part` some of their first points."""

    title: str
    computed: Callable[[], Curves]
    part: Callable[[], Curves] | None = None
    x: str = "oracle calls: gradients + HVPs + cross products"
    y: str = "relative error of the hypergradient"
    logarithmic: str = "xy"
    y_range: tuple[float | None, float | None] = (None, None)
    level: float | None = None  # a horizontal line
    points: tuple[str, ...] = field(default=())  # curves that are drawn without a line

    def picture(self) -> Picture:
        return Picture(self.title, self.computed, self.draw, self.part)

    def draw(self, curves: dict[str, Any]) -> Figure:
        with canvas(6.0, 3.7) as figure:
            axes = figure.subplots()
            for i, (name, points) in enumerate(curves.items()):
                xs, ys = zip(*((x, max(y, FLOOR)) for x, y in points), strict=True)
                look = {
                    "color": CYCLE[i % len(CYCLE)],
                    "marker": MARKS[i % len(MARKS)] if len(points) < 30 else "",
                    "linestyle": "" if name in self.points else DASHES[i % len(DASHES)],
                }
                axes.plot(xs, ys, label=name, **look)
            axes.set(**{f"{name}scale": "log" for name in self.logarithmic})
            if self.level:
                axes.axhline(self.level, color=PALE, linewidth=1)
            axes.set(xlabel=self.x, ylabel=self.y, ylim=self.y_range)
            for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
                _ticks(axis, logarithmic=name in self.logarithmic)
            axes.grid(True)
            figure.legend(loc="outside lower center", ncols=_columns(curves), handlelength=2.6)
            return figure


def _ticks(axis: Any, *, logarithmic: bool) -> None:
    """Round numbers: on a short logarithmic axis 1, 2 and 5, on a long one powers of ten."""
    low, high = axis.get_view_interval()
    if not logarithmic:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=(1, 2, 5, 10)))
        return
    axis.set_minor_formatter(NullFormatter())
    if high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1, 3)))
        axis.set_major_formatter("{x:g}")


def _columns(curves: dict[str, Any]) -> int:
    """As many as fit a line of the legend."""
    return max(1, min(len(curves), 86 // (8 + max(map(len, curves)))))
