"""`runs`: one line a run, chosen and sorted as asked; imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel.cli.answer import JSONAnswer
from bilevel.cli.selection import Listed, cell, chosen, listed, ordered
from bilevel.cli.tables import print_fitted

_STYLES = {"done": "green", "stopped early": "green", "running": "cyan"}

_NOTE = (
    "upper loss: F at the y of the run itself, before its last step. Methods that move y away from "
    "y*(x) reach values that others cannot: bilevel compare has F at y*(x)."
)


_COLUMNS: Mapping[str, Callable[[Listed], Text | str]] = {
    "run": lambda each: Text(each.path),
    "status": lambda each: Text(
        each.summary.status, style=_STYLES.get(each.summary.status, "yellow")
    ),
    "steps": lambda each: (
        f"{each.summary.step}/{each.summary.steps}"
        if each.summary.steps
        else f"{each.summary.step or '-'}"
    ),
    "estimator": lambda each: Text(each.summary.estimator),
    "upper loss": lambda each: (
        "-" if each.summary.upper_loss is None else f"{each.summary.upper_loss:.4e}"
    ),
}
_BESIDE = {"sweep", "run", "name", "status", "step", "steps", "estimator", "upper_loss"}
"""Keys that the columns show as it is."""


def list_runs(
    console: Console,
    runs: Path,
    where: Sequence[str] = (),
    sort: str | None = None,
    descending: bool = False,
    show: Sequence[str] = (),
    every: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Print the runs below a folder that meet every condition; the newest last, unless sorted.

    A sweep is one row, unless `every` run is asked for, or some are chosen or sorted.

    An `answer` has {"runs": [{"run", "name", "status", …, "measures", "measured_at", "settings"}]}.
    """
    found = listed(runs)
    if answer:
        kept = chosen(found, where)
        kept = ordered(kept, sort, descending) if sort is not None else kept
        answer.data["runs"] = [_plain(each) for each in kept]
        return
    if not found:
        console.print(f"No runs in {runs}/. Begin one: bilevel run quadratic", markup=False)
        return
    kept = chosen(found, where)
    if not kept:
        console.print(f"No run of {len(found)} in {runs}/ is so.", markup=False)
        return
    key = (sort or "").removeprefix("-")
    if sort is not None:
        kept = ordered(kept, sort, descending)
    asked = [*show, *([key] if key and key not in (*_BESIDE, *show) else [])]
    columns = dict(_COLUMNS)
    for name in asked:
        of = cell(kept, name, "--show")
        columns[name] = lambda each, of=of: Text(of(each))

    is_grouped = not (every or where or sort or show)
    grouped: dict[str, list[Listed]] = {}
    for each in kept:
        grouped.setdefault(each.sweep if is_grouped and each.sweep else each.path, []).append(each)

    def table(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        shown = {head: cell for head, cell in columns.items() if head not in left_out}
        for head in shown:
            side = "left" if head in ("run", "status", "estimator") else "right"
            made.add_column(head, justify=side, no_wrap=True)
        for name, rows in grouped.items():
            if len(rows) > 1:
                made.add_row(f"{name}/", _statuses(rows), *[""] * (len(shown) - 2))
            else:
                made.add_row(*(cell(rows[0]) for cell in shown.values()))
        return made

    # what was asked for is kept longest
    print_fitted(
        console, table, ("estimator", "upper loss", "steps", *(["status"] if asked else []))
    )
    console.print(_NOTE, style="dim", highlight=False)
    if len(grouped) < len(kept):
        sweep = next(name for name, rows in grouped.items() if len(rows) > 1)
        note = f"A sweep is one row: --where sweep={sweep} lists its runs, --all every run."
        console.print(note, style="dim", markup=False, highlight=False)


def _statuses(rows: Sequence[Listed]) -> Text:
    """`12 runs: 11 done, 1 failed`, in the colour of what is not done."""
    found = Counter(each.summary.status for each in rows)
    said = ", ".join(f"{number} {status}" for status, number in found.most_common())
    style = _STYLES.get(next(iter(found)), "yellow") if len(found) == 1 else "yellow"
    return Text(f"{len(rows)} runs: {said}" if len(found) > 1 else said, style=style)


def _plain(each: Listed) -> dict[str, Any]:
    measured = {"measures": each.measures, "measured_at": each.measured_at}
    return each.columns | measured | {"settings": each.settings}
