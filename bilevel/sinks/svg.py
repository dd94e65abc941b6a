"""Figures of matplotlib as SVG that is the same bytes each time."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure; `options` are those of `savefig`. There is no date in it."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, **options)
    path.write_text(numbered(out.getvalue()), encoding="utf-8")


def numbered(text: str) -> str:
    """The names of clip paths, markers and hatches as numbers, in order of appearance.

    matplotlib makes them from a number drawn for each file, and from every digit of their coordinates, of which
    CPUs with other instructions round the last otherwise.
    """
    names: dict[str, str] = {}
    return re.sub(
        r"\b([pmh])[0-9a-f]{10}\b",
        lambda found: names.setdefault(found[0], f"{found[1]}{len(names)}"),
        text,
    )
