"""How pictures look: light and dark, told apart without colour, the same bytes each time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bilevel.sinks.svg import numbered

INK, PALE, PAPER = "#24292e", "#8c939a", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#00795a", "#a8437f", "#3d9bd4"
"""After Okabe and Ito (2008), whom the colour-blind can follow; green and purple are darker."""
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, INK, SKY)
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (2, 2)))
MARKS = ("o", "s", "^", "D", "v", "P")

DARK = {
    INK: "#e3e6e9",
    PALE: "#7d858d",
    PAPER: "#131416",
    BLUE: "#58b1ee",
    ORANGE: "#f08c45",
    GREEN: "#3ec79a",
    PURPLE: "#e08abb",
    SKY: "#8fd0f5",
}
"""Each colour where the page is dark."""

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "bilevel",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": PALE,
    "grid.alpha": 0.28,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "path.simplify": True,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@contextmanager
def canvas(width: float = 7.2, height: float = 3.6) -> Iterator[Figure]:
    """An empty figure of so many inches, in this style."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def _rounded(path: re.Match[str]) -> str:
    """A path to a hundredth of a point, which no screen shows."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", path[0])


def svg(figure: Figure, title: str) -> str:
    """The picture's bytes: without a date, with a title, and with the colours of a dark page.

    A reader's scheme is that of the page that the picture is in.
    """
    with mpl.rc_context(SETTINGS):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = re.sub(r' d="[^"]*"', _rounded, out.getvalue())
    text = re.sub(r"<\?xml.*?>\s*<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>\n"
    return numbered(text.replace("<metadata>", style + "<metadata>", 1))
