"""What a notebook shows of a result: tables, curves and figures as HTML.

Without a script, a style sheet or a request: a table looks as the notebook's own do, and all colours
are those of the text around it, on a light page and on a dark one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

Curve = Sequence[tuple[float, float]]
"""(step, value), in their order."""

DECADES = 100
"""A curve that spans more than this factor is drawn on a logarithmic scale."""
POINTS = 400
"""Points of a curve at most, at which no eye sees that some are left out."""
WIDTH, HEIGHT = 200, 110


def table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], words: Collection[str] = ()
) -> str:
    """A table whose first column names the rows; `words` are the heads of others without numbers."""
    sides = ["left", *("left" if head in words else "right" for head in heads[1:])]
    top = _row("th", heads, sides)
    body = "".join(_row("td", [name, *cells], sides) for name, cells in rows)
    return f"<table><thead>{top}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    made = [
        f'<{tag} style="text-align:{side};padding:2px 8px">{escape(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    ]
    return f"<tr>{''.join(made)}</tr>"


def aligned(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], words: Collection[str] = ()
) -> list[str]:
    """`table` as lines of text."""
    cells = [heads, *([name, *row] for name, row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<", *("<" if head in words else ">" for head in heads[1:])]
    return [
        "  ".join(
            f"{c:{side}{width}}" for c, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def lines(*texts: str) -> str:
    """A paragraph of lines; empty ones are left out."""
    return f"<p>{'<br>'.join(escape(text) for text in texts if text)}</p>" if any(texts) else ""


def curves(drawn: Mapping[str, Curve]) -> str:
    """One small SVG a curve, by its title; empty without the package `vl_convert` (extra `report`)."""
    finite = {title: _thinned(curve) for title, curve in drawn.items()}
    shown = {title: curve for title, curve in finite.items() if len(curve) > 1}
    if not shown or find_spec("vl_convert") is None:
        return ""
    import vl_convert

    drawings = (vl_convert.vegalite_to_svg(_chart(title, curve)) for title, curve in shown.items())
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(drawings)}</div>'


def _thinned(curve: Curve) -> Curve:
    """The finite points, evenly thinned, the last one among them."""
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    thinned = finite[:: max(1, math.ceil(len(finite) / POINTS))]
    return thinned if thinned[-1:] == finite[-1:] else [*thinned, finite[-1]]


def _chart(title: str, curve: Curve) -> dict[str, Any]:
    values = [value for _, value in curve]
    is_log = min(values) > 0 and max(values) / min(values) > DECADES
    scale: dict[str, Any] = {"type": "log"} if is_log else {"zero": False}
    ink = {"labelColor": "currentColor", "tickColor": "currentColor", "domainColor": "currentColor"}
    faint = {"gridColor": "currentColor", "gridOpacity": 0.15, "titleColor": "currentColor"}
    x_axis = {"title": None, "tickCount": 4, "tickMinStep": 1, "format": "d"}
    x = {"field": "step", "type": "quantitative", "axis": x_axis}
    y_axis = {"title": None, "tickCount": 4, "format": ".0e" if is_log else ".4~g"}
    y_axis["grid"] = not is_log  # whose nine lines a decade would be a grey box
    y = {"field": "value", "type": "quantitative", "axis": y_axis, "scale": scale}
    return {
        "data": {"values": [{"step": step, "value": value} for step, value in curve]},
        "title": {"text": title, "color": "currentColor", "fontSize": 12, "anchor": "start"},
        "mark": {"type": "line", "strokeWidth": 1.6},
        "encoding": {"x": x, "y": y},
        "width": WIDTH,
        "height": HEIGHT,
        "config": {"background": None, "view": {"stroke": None}, "axis": {**ink, **faint}},
    }


def picture(name: str, figure: Any) -> str:
    """A matplotlib figure as an image within the page."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, bbox_inches="tight")
    data = base64.b64encode(out.getvalue()).decode()
    style = "max-width:100%;background:white"
    return f'<img alt="{escape(name)}" style="{style}" src="data:image/png;base64,{data}">'
