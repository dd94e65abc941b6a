"""`compare`: estimators side by side on the recipe's own problem."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel import recipe as recipes
from bilevel import report
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import Stopped, complain
from bilevel.cli.names import locate, names_in
from bilevel.cli.output import going_on
from bilevel.cli.signals import Signals
from bilevel.cli.tables import print_fitted
from bilevel.comparing import figure, plan, table
from bilevel.comparing.files import write
from bilevel.comparing.launch import Done, launch
from bilevel.comparing.plan import Plan
from bilevel.comparing.table import Row
from bilevel.errors import CheckpointError
from bilevel.recipe.seeds import parse_seeds
from bilevel.runfolder.folder import RunFolder, environment
from bilevel.sinks.numbers import counts, duration, small

FAILED = 6
"""Exit code where some cells failed."""


def compare(
    console: Console,
    reference: str,
    overrides: Sequence[str],
    *,
    estimators: str | None,
    given: Path | None,
    seeds: str | None,
    budget: int | None,
    runs: Path,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Measure what was not measured yet, then show the table and write what was found.

    An `answer` is compare.json, with its place as "file".
    """
    recipe = recipes.load(locate(reference), overrides)
    labels, known = None, plan.read_labels(given) if given else {}
    if estimators is not None:
        labels = names_in(estimators, "--estimators")
        if labels != ["all"]:
            known = {name: plan.anchored(name, Path()) for name in labels} | known
    made = plan.make(
        recipe,
        labels=labels,
        given=known,
        seeds=recipe.seeds if seeds is None else parse_seeds(seeds),
        budget=budget,
    )
    for label, reason in made.left_out.items():
        complain(f"{label}: {reason}", kind="left out: ")
    folder = runs / made.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be made: {error.strerror}; name another with --runs-dir"
        ) from error
    with RunFolder(folder).lock(), going_on(f"the comparison in {folder}"):
        done = _measure(Console(quiet=True) if quiet else console, made, folder)
        command = _command(reference, overrides, estimators, given, seeds, budget)
        found = _conclude(console, made, folder, done, command, answer, quiet)
    if any(row.failures for row in found):
        raise Stopped(FAILED)


def _measure(console: Console, made: Plan, folder: Path) -> list[Done]:
    console.print(Text(f"{folder}/", style="dim"), soft_wrap=True)
    total, done = len(made.scenes) + len(made.cells), []
    with Signals():
        try:
            for step in launch(made, folder):
                done.append(step)
                _tell(console, step, len(done), total, left(made, done))
        except Stopped as stopped:
            message = f"stopped; {len(done)} of {total} are done: the same command resumes"
            raise Stopped(stopped.code, message) from None
    return done


def left(made: Plan, done: Sequence[Done]) -> float:
    """Seconds that the rest takes if each takes what its like took, now or in a run before this."""
    taken: dict[str | None, list[float]] = {}
    for step in done:
        if step.seconds:
            taken.setdefault(step.cell and step.cell.label, []).append(step.seconds)
    if not taken:
        return 0.0
    means = {label: statistics.fmean(seconds) for label, seconds in taken.items()}
    mean = statistics.fmean([each for seconds in taken.values() for each in seconds])
    ended = {(step.cell and step.cell.label, step.seed) for step in done}
    steps = [(None, seed) for seed in made.scenes]
    steps += [(cell.label, cell.seed) for cell in made.cells if not cell.refused]
    return sum(means.get(label, mean) for label, seed in steps if (label, seed) not in ended)


def _tell(console: Console, step: Done, number: int, total: int, ahead: float) -> None:
    width = len(str(total))
    what = step.what if step.cell is None else f"{step.what}, seed {step.seed}"
    how = "as before" if step.reused else f"{step.seconds:.1f} s"
    if step.result["status"] != "ok":
        how = "failed"
    rest = f"  about {duration(ahead)} left" if number < total and ahead else ""
    text = f"{number:{width}d}/{total}  {what}: {how}{rest}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _conclude(
    console: Console,
    made: Plan,
    folder: Path,
    done: Sequence[Done],
    command: str,
    answer: JSONAnswer | None,
    quiet: bool,
) -> list[Row]:
    points = [
        point for step in done if step.cell is None for point in step.result.get("points", ())
    ]
    tolerance = max((point["tolerance"] or 0.0 for point in points), default=0.0)
    cells = [(step.cell, step.result) for step in done if step.cell is not None]
    found = table.rows([(cell.label, cell.seed, result) for cell, result in cells], tolerance)
    names = sorted({point["reference"] or "none" for point in points})
    note = shrinking(points)
    document = {
        "recipe": made.recipe.content,
        "hash": made.recipe.hash,
        "seeds": made.seeds,
        "left_out": made.left_out,
        "points": {step.seed: step.result.get("points") for step in done if step.cell is None},
        "rows": [asdict(row) | {"calls": row.calls} for row in found],
        "cells": [
            {"label": cell.label, "seed": cell.seed, **result, **_estimator(cell.recipe)}
            for cell, result in cells
        ],
        "environment": environment(),
        "notes": [note] if note else [],
        "command": command,
    }
    write(folder / "compare.json", document)
    if answer:
        answer.data = document | {"file": str(folder / "compare.json")}
    _print(console, made, found, ", ".join(names), _budget([result for _, result in cells]), quiet)
    if note:
        console.print(note, highlight=False)
    if not figure.is_possible():
        complain("no figure: it needs matplotlib: pip install 'bilevel[report]'", kind="note: ")
    else:
        figure.draw(found, folder, f"{made.recipe.name}: error against cost")
    console.print(Text(f"{folder / 'compare.json'}"), soft_wrap=True)
    _write_page(console, folder)
    return found


def _write_page(console: Console, folder: Path) -> None:
    if absent := report.missing():
        lacking = ", ".join(absent)
        complain(f"no page: it needs {lacking}: pip install 'bilevel[report]'", kind="note: ")
        return
    try:
        console.print(Text(f"{report.write_comparison(folder)}"), soft_wrap=True)
    except CheckpointError as error:
        complain(f"no page: {error}", kind="warning: ")


def _command(
    reference: str,
    overrides: Sequence[str],
    estimators: str | None,
    given: Path | None,
    seeds: str | None,
    budget: int | None,
) -> str:
    """As it is typed, to be copied from the page."""
    options = {"--estimators": estimators, "--labels": given, "--seeds": seeds, "--budget": budget}
    words = [word for name, value in options.items() if value for word in (name, str(value))]
    return shlex.join(["bilevel", "compare", reference, *overrides, *words])


def _estimator(recipe: recipes.Recipe | None) -> dict[str, object]:
    return {"estimator": recipe.content["estimator"] if recipe else None}


def shrinking(points: Sequence[Mapping[str, Any]]) -> str | None:
    """A note where dΦ/dx at the end of a run is so small that errors relative to it are large."""
    sizes: dict[int, list[float]] = {}
    for point in points:
        if point.get("size") is not None:
            sizes.setdefault(point["step"], []).append(point["size"])
    if not sizes:
        return None
    first, last = (statistics.median(sizes[step]) for step in (min(sizes), max(sizes)))
    if not last < first / 10:
        return None
    return (
        f"‖dΦ/dx‖ falls from {first:.1e} at the start of the run to {last:.1e} at its end. Errors are "
        f"relative to it at each point: 1 there is {last / first:.1e} of what it was at the start."
    )


def _budget(results: Sequence[Mapping[str, Any]]) -> str:
    budgets = sorted({result["run"]["budget"] for result in results if "run" in result})
    if not budgets:
        return "-"
    ends = dict.fromkeys((budgets[0], budgets[-1]))
    return " to ".join(f"{end:,}" for end in ends)


def _print(
    console: Console, made: Plan, found: Sequence[Row], known: str, budget: str, quiet: bool
) -> None:
    count = f"{len(made.seeds)} seed" + ("s" if len(made.seeds) > 1 else "")
    text = (
        f"{made.recipe.name}, {count}; reference: {known or 'none'}; budget: {budget} oracle calls"
    )
    console.print()
    console.print(text, markup=False, highlight=False)
    rows = [_cells(row) for row in found]
    # room is short: what was not measured is left out, and warm where it tells nothing
    kept = [n for n in range(len(_HEADS)) if any(row[n + 2] != "-" for row in rows)]
    if not any(row.has_state for row in found):
        kept = [n for n in kept if n != _HEADS.index("err\nwarm")]

    def shown(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        made.add_column("#", justify="right", no_wrap=True, vertical="bottom")
        made.add_column("estimator", no_wrap=True, vertical="bottom")
        wide = [n for n in kept if _HEADS[n] not in left_out]
        for n in wide:
            made.add_column(_HEADS[n], justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            made.add_row(*row[:2], *(row[n + 2] for n in wide))
        return made

    print_fitted(console, shown, ("cos", "MB", "err\nwarm", "err\nat end", "err\nin run"))
    console.print()
    _print_spread(console, found)
    if not quiet:
        warm = _WARM if any(row.has_state for row in found) else ""
        console.print(_LEGEND.format(warm=warm), style="dim", highlight=False)
    for row in found:
        for reason in row.failures:
            console.print(Text.assemble((row.label, "bold"), f", {reason}"))


def _print_spread(console: Console, found: Sequence[Row]) -> None:
    """How far the seeds lie apart; nothing of a comparison at one seed."""
    rows = [row for row in found if row.spread]
    if not rows:
        return

    def shown(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        made.add_column("estimator", no_wrap=True)
        wide = [head for head in _SPREAD if head not in left_out]
        for head in wide:
            made.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            made.add_row(row.label, *(_ends(row, *_SPREAD[head]) for head in wide))
        return made

    console.print("From the lowest to the highest seed:", highlight=False)
    print_fitted(console, shown, ("err at y*", "F at end"))
    console.print()


def _ends(row: Row, key: str, scale: float, form: str) -> str:
    found = row.spread.get(key)
    return " to ".join(small(scale * end, form) for end in found) if found else "-"


def _cells(row: Row) -> list[str | Text]:
    parts = [part for part in (row.gradients, row.hvps, row.cross_products) if part is not None]
    return [
        "-" if row.rank is None else f"{row.rank}",
        Text(f"{row.label}*" if row.has_state else row.label, "green" if row.is_front else ""),
        small(row.error),
        small(row.trained),
        small(row.warm),
        small(row.cosine, ".3f"),
        small(row.in_run),
        small(row.seconds and 1e3 * row.seconds, ".3g"),
        small(None if row.memory is None else row.memory / 1e6, ".0f"),
        counts(*parts) if len(parts) == 3 else "-",
        Text("failed", style="bold red") if row.failures else small(row.upper_loss, ".4g"),
    ]


_HEADS = (
    "err\nat y*",
    "err\nat end",
    "err\nwarm",
    "cos",
    "err\nin run",
    "ms",
    "MB",
    "grad/HVP\n/cross",
    "F\nat end",
)
_SPREAD = {
    "err at y*": ("error", 1.0, ".1e"),
    "ms": ("seconds", 1e3, ".3g"),
    "F at end": ("upper_loss", 1.0, ".4g"),
}
"""Column: what of a row's spread, times what, in which form."""
_LEGEND = (
    "err: ‖h − dΦ/dx‖ / ‖dΦ/dx‖, median along the recipe's run; at end: its last point; {warm}"
    "in run: after its own lower solves. F at end: F(x, y*) once gradients + HVPs + cross products "
    "reach the budget, on one batch a level: with minibatches a number of that batch, noise included."
)
_WARM = "warm (*): with the state of the point before; "
