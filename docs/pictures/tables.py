"""Pictures of tables that pages already hold, so that both say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docs.pictures.style import BLUE, INK, ORANGE, PALE, canvas

PAGE = Path(__file__).parent.parent / "benchmarks.md"
TITLE = "Time and memory beside other libraries"
TASKS = {"cg": "ten CG products", "unroll": "fifty steps unrolled"}


def rows(text: str, name: str) -> dict[str, list[float]]:
    """{row: [time, memory], both relative to the first row} of a marked table of the benchmarks."""
    part = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert part, f"no table {name!r}"
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in part[1].strip().splitlines()]
    return {
        row[0] + (" (wrong)" if "wrong" in row[5] else ""): [float(row[2]), float(row[4])]
        for row in cells[2:]
    }


def compute() -> dict[str, Any]:
    text = PAGE.read_text("utf-8")
    return {name: rows(text, name) for name in TASKS}


SIDES = {
    "recompute": (0, -14),
    "traced": (0, 7),
    "mixed": (0, 7),
    "checkpoint": (0, 7),
    "floor": (4, -13),
}
"""Where a label stands whose neighbours are close, in points."""


def draw(data: dict[str, Any]) -> Figure:
    with canvas(6.6, 3.5) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 2), TASKS.items(), strict=True):
            crowd = []
            for row, (time, memory) in data[name].items():
                ours = row.startswith("bilevel")
                color = BLUE if ours else INK if time == memory == 1 else ORANGE
                axes.plot([time], [memory], "o" if ours else "s", color=color)
                words = row.removeprefix("bilevel, ").split(",")[0]
                if name == "unroll" and memory > 0.9:
                    crowd.append(words)  # they tie
                    continue
                right = time < 1.28
                at = SIDES.get(words, (6, 4) if right else (-6, 4))
                align = "center" if at[0] == 0 else "left" if at[0] > 0 else "right"
                offset = {"textcoords": "offset points", "ha": align, "fontsize": 8}
                axes.annotate(words, (time, memory), at, color=color, **offset)
            if crowd:
                axes.text(1.2, 0.97, "\n".join(crowd), va="top", fontsize=8, color=PALE)
            axes.set(
                title=title,
                xlabel="time, first row = 1",
                ylim=(0, 1.12 * max(m for _, m in data[name].values())),
            )
            axes.margins(x=0.12)
            axes.grid(True)
            if name == "cg":
                axes.set(ylabel="memory, first row = 1", xlim=(0.95, 1.42))
            else:
                axes.set(xlim=(0.85, 1.95))
        return figure
