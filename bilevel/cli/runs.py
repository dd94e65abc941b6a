"""`runs`: one line a run; imports no torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel.runfolder.folder import summaries

_STYLES = {"done": "green", "running": "cyan"}

_NOTE = (
    "upper loss: F at the y of the run itself, before its last step. Methods that move y away from "
    "y*(x) reach values that others cannot: bilevel compare has F at y*(x)."
)


def list_runs(console: Console, runs: Path) -> None:
    """Print all runs below a folder, the newest last."""
    found = summaries(runs)
    if not found:
        console.print(f"No runs in {runs}/. Begin one: bilevel run quadratic", markup=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("estimator", overflow="fold")
    table.add_column("upper loss", justify="right", no_wrap=True)
    for summary in found:
        loss = "-" if summary.upper_loss is None else f"{summary.upper_loss:.4e}"
        table.add_row(
            Text(str(summary.folder.path.relative_to(runs))),
            Text(summary.status, style=_STYLES.get(summary.status, "yellow")),
            f"{summary.step}/{summary.steps}" if summary.steps else "-",
            Text(summary.estimator),
            loss,
        )
    console.print(table)
    console.print(_NOTE, style="dim", highlight=False)
