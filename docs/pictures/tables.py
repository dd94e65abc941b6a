"""Time against memory of two rows of the benchmark, from what its tables are written from."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from docs.pictures.style import BLUE, INK, ORANGE, PALE, canvas

KEPT = Path(__file__).parent.parent / "benchmarks"
TITLE = "Time and memory beside other libraries"
TASKS = {"cg": "ten CG products", "unroll": "fifty steps unrolled"}
WRONG = 1e-2


def rows(name: str) -> dict[str, list[float]]:
    """{method: [time, memory], both relative to the first} of a row that is kept."""
    methods = json.loads((KEPT / f"{name}.json").read_text("utf-8"))["methods"]
    first = methods[0]
    found = {}
    for method in methods:
        pairs = zip(method["seconds"], first["seconds"], strict=True)
        label = method["name"] + (" (wrong)" if (method["error"] or 0) > WRONG else "")
        memory = method["bytes"] / max(first["bytes"], 1)
        found[label] = [round(median(a / b for a, b in pairs), 2), round(memory, 2)]
    return found


def compute() -> dict[str, Any]:
    return {name: rows(name) for name in TASKS}


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
                times = [time for time, _ in data[name].values()]
                axes.set(xlim=(min(0.85, min(times) - 0.1), max(1.95, max(times) + 0.2)))
        return figure
