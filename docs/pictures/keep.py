"""A picture's numbers and bytes as files: written, and held against what is computed now."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from docs.pictures.style import svg

HERE = Path(__file__).parent
DIGITS = 5
"""Significant digits of a kept number: more than a picture shows."""
ROUNDING = 1e-8
"""Errors below this are rounding, which is another on another machine."""


class Picture(NamedTuple):
    """`compute` returns numbers in dicts and lists; where it is dear, `part` a beginning of them.

    `draw` makes a figure of them, or the SVG itself.
    """

    title: str
    compute: Callable[[], Any]
    draw: Callable[[Any], Figure | str]
    part: Callable[[], Any] | None = None


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def data_of(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text("utf-8"))


def picture_of(name: str, picture: Picture) -> str:
    """The SVG of the numbers that are kept."""
    drawn = picture.draw(data_of(name))
    return drawn if isinstance(drawn, str) else svg(drawn, picture.title)


def compute(name: str, picture: Picture) -> None:
    text = json.dumps(_short(picture.compute()), ensure_ascii=False, separators=(",", ":"))
    (HERE / f"{name}.json").write_text(text + "\n", "utf-8")


def draw(name: str, picture: Picture) -> None:
    (HERE / f"{name}.svg").write_text(picture_of(name, picture), "utf-8")


def differences(found: Any, kept: Any, at: str = "", tolerance: float = 0.01) -> Iterator[str]:
    """Where numbers just computed are not those kept, of which they may be a beginning."""
    if isinstance(found, dict) and isinstance(kept, dict):
        for key, value in found.items():
            if key in kept:
                yield from differences(value, kept[key], f"{at}/{key}", tolerance)
            else:
                yield f"{at}/{key}: not kept"
    elif isinstance(found, list | tuple) and isinstance(kept, list) and len(found) <= len(kept):
        for i, value in enumerate(found):
            yield from differences(value, kept[i], f"{at}/{i}", tolerance)
    elif isinstance(found, float | int) and isinstance(kept, float | int):
        if not math.isclose(found, kept, rel_tol=tolerance, abs_tol=ROUNDING):
            yield f"{at}: {found:g}, kept is {kept:g}"
    elif found != kept:
        yield f"{at}: {found!r}, kept is {kept!r}"
