"""Tables in terminals of any width: a column less rather than a name in two."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from rich.console import Console, RenderableType
from rich.measure import Measurement

WIDEST = 10_000


def natural_width(console: Console, table: RenderableType) -> int:
    """The columns of the screen that a table takes where nothing is cut or wrapped."""
    return Measurement.get(console, console.options.update(width=WIDEST), table).maximum


def room(console: Console) -> int:
    """The columns there are: no end of them where no terminal reads, unless COLUMNS says so."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else WIDEST


def print_fitted(
    console: Console, table: Callable[[Collection[str]], RenderableType], spare: Sequence[str]
) -> None:
    """Print `table(left_out)` with as few of the columns in `spare` left out, the first first, as fit."""
    made, left_out = table(()), spare[:0]
    while (width := natural_width(console, made)) > room(console) and len(left_out) < len(spare):
        left_out = spare[: len(left_out) + 1]
        made = table(left_out)
    before = console.width
    console.width = max(before, width)  # beyond which print makes nothing
    console.print(made)
    console.width = before
    if left_out:
        names = ", ".join(name.replace("\n", " ") for name in left_out)
        console.print(f"left out, for want of width: {names}", style="dim", highlight=False)
