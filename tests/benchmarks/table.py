"""What was measured, as Markdown between two markers of a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from docs.pages import put


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    name: str
    seconds: list[float]
    bytes: int
    error: float | None
    """Relative, against the truth; None for a row that computes no hypergradient."""


def table(rows: list[Row], against: str) -> str:
    """Medians, and medians of the ratios to the row `against` within each round."""
    base = next(row for row in rows if row.name == against)
    lines = [
        f"| | CPU seconds | time / {against} | peak MB | memory / {against} | relative error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = median(a / b for a, b in zip(row.seconds, base.seconds, strict=True))
        lines.append(
            f"| {row.name} | {median(row.seconds):.2f} | {ratio:.2f} | {row.bytes / 1e6:.0f} "
            f"| {row.bytes / max(base.bytes, 1):.2f} | {_error(row.error)} |"
        )
    return "\n".join(lines)


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    return f"**{value:.1g}, wrong**" if value > WRONG else f"{value:.0e}"


WRONG = 1e-2
"""Float32 rounding through these tasks stays below 1e-4."""


def write(page: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of that name.

    Raises:
        ValueError: the page has no such markers.
    """
    page.write_text(put(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
