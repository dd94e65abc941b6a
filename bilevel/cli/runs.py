"""`runs`: one line a run; imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel.cli.tables import print_fitted
from bilevel.runfolder.folder import Summary, summaries

_STYLES = {"done": "green", "running": "cyan"}

_NOTE = (
    "upper loss: F at the y of the run itself, before its last step. Methods that move y away from "
    "y*(x) reach values that others cannot: bilevel compare has F at y*(x)."
)


_HEADS = ("run", "status", "steps", "estimator", "upper loss")


def _cells(summary: Summary, runs: Path) -> tuple[Text | str, ...]:
    steps = f"{summary.step}/{summary.steps}" if summary.steps else f"{summary.step or '-'}"
    return (
        Text(str(summary.folder.path.relative_to(runs))),
        Text(summary.status, style=_STYLES.get(summary.status, "yellow")),
        steps,
        Text(summary.estimator),
        "-" if summary.upper_loss is None else f"{summary.upper_loss:.4e}",
    )


def list_runs(console: Console, runs: Path) -> None:
    """Print all runs below a folder, the newest last."""
    found = summaries(runs)
    if not found:
        console.print(f"No runs in {runs}/. Begin one: bilevel run quadratic", markup=False)
        return

    def table(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for head in (head for head in _HEADS if head not in left_out):
            side = "right" if head in ("steps", "upper loss") else "left"
            made.add_column(head, justify=side, no_wrap=True)
        for summary in found:
            cells = zip(_HEADS, _cells(summary, runs), strict=True)
            made.add_row(*(cell for head, cell in cells if head not in left_out))
        return made

    print_fitted(console, table, ("estimator", "upper loss", "steps"))
    console.print(_NOTE, style="dim", highlight=False)
