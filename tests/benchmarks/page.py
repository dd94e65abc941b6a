"""The page and the pictures of the benchmark, from what is kept alone: python -m tests.benchmarks.page."""

from __future__ import annotations

import json
from pathlib import Path

from docs.pages import put
from tests.benchmarks import measured
from tests.benchmarks.environments import ROOT
from tests.benchmarks.measured import KEPT, Measured
from tests.benchmarks.rows import COMMANDS, ROWS
from tests.benchmarks.table import growth, startup, summary, table

PAGE = ROOT / "docs" / "benchmarks.md"


def rows(kept: Path = KEPT) -> list[Measured]:
    """What has been measured, in the order of the page."""
    found = (measured.load(name, kept) for name in ROWS)
    return [row for row in found if row is not None]


def written(text: str, found: list[Measured]) -> str:
    """The text of the page with the tables of these rows.

    Raises:
        ValueError: the page has no place for one of them.
    """
    starts = [row for row in found if row.row in COMMANDS]
    for row in found:
        if row not in starts:
            text = put(text, row.row, table(row))
    text = put(text, "start-up", startup(starts)) if starts else text
    return put(put(text, "summary", summary(found)), "machine", machines(found))


def machines(found: list[Measured]) -> str:
    """What the rows were measured on, a line for each machine and state."""
    lines: dict[str, list[str]] = {}
    for row in found:
        m = row.machine
        line = (
            f"{m['processor']}, {m['cores']} cores; torch {m['torch']}, Python {m['python']}; "
            f"{row.date}, commit {row.commit}, {len(row.methods[0].seconds)} rounds"
        )
        lines.setdefault(line, []).append(row.row)
    return "\n".join(f"- {line}: {'; '.join(names)}." for line, names in lines.items())


def write(page: Path = PAGE, kept: Path = KEPT) -> None:
    text = written(page.read_text(encoding="utf-8"), rows(kept))
    sizes = kept / "growth.json"
    if sizes.exists():
        text = put(text, "growth", growth(json.loads(sizes.read_text(encoding="utf-8"))["axes"]))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
