"""Names beside the points of a figure, so that none hides another or a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

NEAR = 8.0
"""Points closer than this, in points of a figure, share a label."""
_MARKER = 5.0


def place(
    axes: Any,
    points: Sequence[tuple[float, float, str]],
    corners: Sequence[tuple[float, float]] = (),
) -> list[Any]:
    """Write each point's name where there is room, with a thin line to it where that is far off.

    Greedy: the first place on growing circles that is free and inside the axes, else the one that
    hides least. A staircase with `corners` is kept free too. Returns the texts.
    """
    figure = axes.figure
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    groups = _groups(axes, points, NEAR * scale)
    from matplotlib.transforms import Bbox

    size = _MARKER * scale
    taken = [
        Bbox.from_extents(px - size, py - size, px + size, py + size) for (px, py), _, _ in groups
    ]
    taken += _stairs(axes, corners, scale)
    frame, texts = axes.get_window_extent(renderer), []
    for pixel, at, names in groups:
        text = axes.annotate(
            "\n".join(names),
            at,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize="small",
            va="bottom",
        )
        box = text.get_window_extent(renderer)
        width, height = box.width / scale + 2, box.height / scale + 2
        best = None
        for x, y in _places(width, height):
            moved = _box(pixel, x, y, width, height, scale)
            hidden = sum(_overlap(moved, other) for other in taken)
            hidden += width * height * scale**2 - _overlap(moved, frame)
            if best is None or hidden < best[0] - 1e-9:
                best = (hidden, x, y, moved)
            if hidden <= 1e-9:
                break
        assert best is not None
        _, x, y, moved = best
        text.set_position((x, y))
        taken.append(moved)
        texts.append(text)
        _lead(axes, at, pixel, moved, scale)
    return texts


def _groups(
    axes: Any, points: Sequence[tuple[float, float, str]], near: float
) -> list[tuple[tuple[float, float], tuple[float, float], list[str]]]:
    """(pixel, data, names) of points that are told apart; the others share a label."""
    found: list[tuple[tuple[float, float], tuple[float, float], list[str]]] = []
    for cost, error, name in points:
        px, py = axes.transData.transform((cost, error))
        for (qx, qy), _, names in found:
            if math.hypot(px - qx, py - qy) < near:
                names.append(name)
                break
        else:
            found.append(((px, py), (cost, error), [name]))
    return found


def _stairs(axes: Any, corners: Sequence[tuple[float, float]], width: float) -> list[Any]:
    """Thin boxes along a staircase."""
    from matplotlib.transforms import Bbox

    pixels = [axes.transData.transform(corner) for corner in corners]
    return [
        Bbox.from_extents(
            min(ax, bx) - width, min(ay, by) - width, max(ax, bx) + width, max(ay, by) + width
        )
        for (ax, ay), (bx, by) in itertools.pairwise(pixels)
    ]


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners of a label, relative to its point, the preferred first."""
    for gap in (7.0, 16.0, 28.0, 42.0, 60.0, 80.0, 110.0):
        yield gap, -height / 2
        yield -gap - width, -height / 2
        for x in (gap / 2, -width / 2, -gap / 2 - width):
            yield x, gap
            yield x, -gap - height
        for y in (gap, -gap - height):
            yield gap, y
            yield -gap - width, y


def _box(
    pixel: tuple[float, float], x: float, y: float, width: float, height: float, scale: float
) -> Any:
    from matplotlib.transforms import Bbox

    left, low = pixel[0] + x * scale, pixel[1] + y * scale
    return Bbox.from_bounds(left, low, width * scale, height * scale)


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _lead(
    axes: Any, at: tuple[float, float], pixel: tuple[float, float], box: Any, scale: float
) -> None:
    """A line from the point to the nearest edge of a label that is not beside it."""
    x = min(max(pixel[0], box.x0), box.x1)
    y = min(max(pixel[1], box.y0), box.y1)
    if math.hypot(x - pixel[0], y - pixel[1]) > 12 * scale:
        end = axes.transData.inverted().transform((x, y))
        axes.plot((at[0], end[0]), (at[1], end[1]), color="0.6", linewidth=0.6, zorder=1)
