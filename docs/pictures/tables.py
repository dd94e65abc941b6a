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
TIE = 0.1
"""Methods that are as near to the first as this in both are named together."""


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
    "JAX, rematerialized": (0, 22),
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
                words = row.removeprefix("bilevel, ").removesuffix(", all graphs kept")
                if name == "unroll" and max(abs(time - 1), abs(memory - 1)) < TIE:
                    crowd.append(words)
                    continue
                right = time < 1.4
                at = SIDES.get(words, (6, 4) if right else (-6, 4))
                align = "center" if at[0] == 0 else "left" if at[0] > 0 else "right"
                offset = {"textcoords": "offset points", "ha": align, "fontsize": 8}
                axes.annotate(words, (time, memory), at, color=color, **offset)
            if crowd:
                axes.text(1.12, 1.0, "\n".join(crowd), va="top", fontsize=8, color=PALE)
            times, memories = zip(*data[name].values(), strict=True)
            room = 0.15 * (max(times) - min(times))
            axes.set(
                title=title,
                xlabel="time, first row = 1",
                xlim=(min(times) - room, max(times) + 1.5 * room),
                ylim=(-0.06 * max(memories), 1.12 * max(memories)),
            )
            axes.grid(True)
            if name == "cg":
                axes.set(ylabel="memory, first row = 1")
        return figure
