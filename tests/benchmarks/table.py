"""What was measured, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from tests.benchmarks.measured import Measured, Method

SMALL = 20e6
"""Bytes below which the memory of a row is not shown: what the allocator keeps is as much."""


def table(found: Measured) -> str:
    """A row's methods: medians, and medians of the ratios to the floor within each round."""
    peer, counted = found.best_peer, found.unit == "products"
    against = f" / {peer.name}, the best peer |" if peer else ""
    sized = max(method.bytes or 0 for method in found.methods) > SMALL
    head = [found.unit if counted else "CPU time", f"/ {found.floor}"]
    head += [against.strip(" |")] if peer else []
    head += ["peak MB"] if sized else []
    head += ["relative error"]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method in found.methods:
        cells = [_amount(method, found), _ratio(found, method.name, found.floor)]
        if peer:
            cells.append(_against(found, method, peer))
        if sized:
            cells.append("–" if method.bytes is None else f"{method.bytes / 1e6:.0f}")
        lines.append(f"| {method.name} | {' | '.join([*cells, error(method)])} |")
    lines += [f"| {name} | –{' |' * len(head)}" for name in found.absent]
    return "\n".join(lines + _reasons(found))


def startup(found: list[Measured]) -> str:
    """A line a command, the floor first."""
    lines = ["| | CPU time | / import torch |", "|---|---|---|"]
    for row in found:
        what = row.row.removeprefix("start-up, ")
        for method in row.methods:
            if method.name == row.floor and row is not found[0]:
                continue
            label = {row.floor: row.floor, "bilevel": f"`bilevel {what}`"}.get(method.name)
            if what == "import":
                label = f"`import {'bilevel' if method.is_ours else method.name}`"
            if method.name == row.floor:
                label = f"`{row.floor}`"
            cells = [_amount(method, row), _ratio(row, method.name, row.floor)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(data: dict[str, Any]) -> str:
    """Exponents of counted work / memory / measured time, a line an estimator, a column a size."""
    lines = [
        "| work, memory, CPU time | " + " | ".join(data) + " |",
        "|---" * (len(data) + 1) + "|",
    ]
    for name in next(iter(data.values()))["curves"]:
        cells = []
        for axis in data.values():
            curves = axis["curves"][name]
            slopes = [exponent(axis["sizes"], curves[k]) for k in ("work", "memory", "seconds")]
            cells.append(", ".join(f"{slope:.2f}" for slope in slopes))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope between the two largest sizes on logarithmic axes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def summary(rows: list[Measured]) -> str:
    """A line a row: this library beside the floor and the best peer, losses in bold."""
    lines = ["| | here | / by hand | best peer | / best peer |", "|---|---|---|---|---|"]
    for found in rows:
        ours, peer = found.ours, found.best_peer
        cells = [
            found.row,
            _amount(ours, found),
            _ratio(found, ours.name, found.floor),
            peer.name if peer else "–",
            _against(found, ours, peer) if peer else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(found: Measured, method: Method, peer: Method) -> str:
    """A ratio to the best peer, bold where it is a loss."""
    if not method.is_ours:
        return ""
    value = found.ratio(method.name, peer.name)[1]
    return f"**{value:.2f}**" if f"{value:.2f}" > "1.00" or value >= 10 else f"{value:.2f}"


def _ratio(found: Measured, name: str, other: str) -> str:
    low, middle, high = found.ratio(name, other)
    if name == other or f"{low:.2f}" == f"{high:.2f}":
        return f"{middle:.2f}"
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _amount(method: Method, found: Measured) -> str:
    value = median(method.seconds) / found.per
    if found.unit == "products":
        return f"{value:.0f}"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.0f} µs"


def error(method: Method) -> str:
    if method.error is None:
        return "–"
    if method.is_wrong:
        return f"**{method.error:.1g}, wrong**"
    return "0" if method.error == 0 else f"{method.error:.0e}"


def _reasons(found: Measured) -> list[str]:
    if not found.absent:
        return []
    return ["", *(f"- {name}: {reason}." for name, reason in found.absent.items())]
