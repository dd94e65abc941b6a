"""`check`: are the hypergradients right on the recipe's problem? A row for each estimator."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel import recipe as recipes
from bilevel import registry, testing
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import complain, requiring
from bilevel.cli.names import locate, names_in
from bilevel.cli.tables import print_fitted
from bilevel.cli.user_code import explaining
from bilevel.errors import CheckError, RecipeError, RequirementError
from bilevel.events import Event, Progress
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.report import write_check
from bilevel.run.setup import Setup
from bilevel.sinks.console import ConsoleReceiver
from bilevel.testing import Agreement, CheckRow, PathRow
from bilevel.testing.table import CLAIM_ALONE, COLUMNS, WORDS
from bilevel.types import Estimator, Stats

Row = TypeVar("Row", CheckRow, PathRow)
VARIABLES = 5
"""Upper variables that a terminal of 80 columns has room for."""
AGREES = 0.8
"""Cosine from which on a hypergradient points where the run goes."""
LONGEST = 17
"""Characters of a name beside which the table has room to spare in 80 columns."""
_STYLES = {
    "exact": "green",
    "as claimed": "green",
    "wrong": "bold red",
    "refused": "yellow",
    "untested": "yellow",
}


def check(
    console: Console,
    reference: str,
    overrides: Sequence[str],
    estimators: str | None,
    *,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
    page: Path | None = None,
) -> None:
    """Print a row for each estimator.

    An `answer` has {"recipe", "hash", "rows", "content", "command"}, the rows as `bilevel.testing.CheckRow` has them.

    Raises `CheckError` if one is wrong, or if one that was asked for, or the recipe's own, is refused.
    """
    recipe = recipes.load(locate(reference), overrides)
    asked = None if estimators is None else names_in(estimators, "--estimators")
    chosen, missing = _estimators(recipe, asked)
    setup = assemble(recipe)
    shown = _progress(console, quiet)
    rows = _received(shown, setup, testing.check(setup, chosen), CheckRow, [*chosen])
    known = rows[0].reference
    rows += [_untested(name, known, reason) for name, reason in missing.items()]
    document = _document(recipe, rows, _command(reference, overrides, estimators))
    if answer:
        answer.data = document
    _print(console, recipe, rows, quiet)
    if page:
        console.print(Text(f"{write_check(document, page)}"), soft_wrap=True)
    wrong = [row.name for row in rows if row.verdict == "wrong"]
    if wrong:
        raise CheckError(f"{', '.join(wrong)}: not the hypergradient that is claimed")
    if missing:
        raise RequirementError(f"{', '.join(missing)}: not tested, the note above says why")
    meant = asked if asked and asked != ["all"] else [recipe.content["estimator"]["name"]]
    refused = [row.name for row in rows if row.verdict == "refused" and row.name in meant]
    if refused:
        raise CheckError(f"{', '.join(refused)}: cannot work on this problem")


def check_path(
    console: Console,
    reference: str,
    overrides: Sequence[str],
    estimators: str | None,
    *,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
    page: Path | None = None,
) -> None:
    """Print how each estimator agrees with the path that is run, a column an upper variable.

    The recipe's own estimator alone where none is named. An `answer` is that of `check`, with rows as
    `bilevel.testing.PathRow` has them. Raises `CheckError` if one that was named,
    or the recipe's own, cannot work.
    """
    recipe = recipes.load(locate(reference), overrides)
    own = recipe.content["estimator"]["name"]
    asked = [own] if estimators is None else names_in(estimators, "--estimators")
    chosen, missing = _estimators(recipe, None if asked == ["all"] else asked)
    setup = assemble(recipe)
    shown = _progress(console, quiet)
    rows = _received(shown, setup, testing.path_agreement(setup, chosen), PathRow, [*chosen])
    command = _command(reference, overrides, estimators, "--path")
    document = _document(recipe, rows, command)
    if answer:
        answer.data = document
    _print_path(console, recipe, rows, quiet)
    if page:
        console.print(Text(f"{write_check(document, page)}"), soft_wrap=True)
    failed = [row.name for row in rows if row.whole is None and asked != ["all"]]
    if failed:
        raise CheckError(f"{', '.join(failed)}: cannot work on this problem")
    if missing:
        raise RequirementError(f"{', '.join(missing)}: not tested; {'; '.join(missing.values())}")


def _document(recipe: Recipe, rows: Sequence[Row], command: str) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "hash": recipe.hash,
        "rows": [asdict(row) for row in rows],
        "content": recipe.content,
        "command": command,
    }


def _command(
    reference: str, overrides: Sequence[str], estimators: str | None, *options: str
) -> str:
    """As it is typed, to be copied from the page."""
    chosen = ["--estimators", estimators] if estimators else []
    return shlex.join(["bilevel", "check", reference, *overrides, *chosen, *options])


def _progress(console: Console, quiet: bool) -> Console:
    """Where progress is shown: nowhere, if not asked for."""
    return Console(quiet=True) if quiet else console


def _received(
    console: Console,
    setup: Setup,
    events: Iterator[Event | Row],
    kind: type[Row],
    names: Sequence[str],
) -> list[Row]:
    """The rows among the events, while the others are shown as they come, and whose turn it is."""
    shown, rows, total = ConsoleReceiver(console), [], len(names)
    try:
        shown.receive(Progress("checking", 0, total, f"the truth, then {names[0]}"))
        with explaining(), requiring(f"problem {type(setup.problem).__name__}"):
            for event in events:
                if isinstance(event, kind):
                    rows.append(event)
                    now = names[len(rows)] if len(rows) < total else ""
                    shown.receive(Progress("checking", len(rows), total, now))
                else:
                    shown.receive(cast(Event, event))
    finally:
        shown.close()
    return rows


def _print_path(
    console: Console, recipe: Recipe, rows: Sequence[PathRow], quiet: bool = False
) -> None:
    text = f"{recipe.name}: agreement with central differences of the lower path that is run"
    console.print(text, markup=False, highlight=False)
    entries = list(dict.fromkeys(entry for row in rows for entry in row.agreements))
    shown, left = entries[:VARIABLES], entries[VARIABLES:]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("estimator", overflow="fold", vertical="bottom")
    for head in (*shown, "all"):
        table.add_column(head.replace("_", "\n"), justify="right", vertical="bottom")
    for row in rows:
        cells = [row.agreements.get(entry) for entry in shown]
        table.add_row(Text(row.name), *(_agreement(cell) for cell in (*cells, row.whole)))
    console.print()
    console.print(table)
    if quiet:
        return
    console.print()
    console.print(_PATH_LEGEND, style="dim", highlight=False)
    if left:
        console.print(f"in `all` alone: {len(left)} more of them", highlight=False)
    if rough := _rough(rows):
        console.print(_ROUGH_LEGEND.format(rough=rough), highlight=False)
    for row in rows:
        if row.note:
            console.print(Text.assemble((row.name, "bold"), f": {row.note}"))


def _agreement(found: Agreement | None) -> Text:
    if found is None:
        return Text("-")
    style = "green" if found.cosine >= AGREES else "bold red"
    mark = "?" if found.is_rough else ""
    return Text.assemble((f"{found.cosine:.2f}", style), f" ×{found.ratio:.2g}{mark}")


def _rough(rows: Sequence[PathRow]) -> str:
    """Variables whose differences are rough, with their error; the same in every row."""
    every = {name: found for row in rows for name, found in row.agreements.items()}
    return ", ".join(f"{n} by {found.error:.0%}" for n, found in every.items() if found.is_rough)


def _untested(name: str, reference: str, reason: str) -> CheckRow:
    return CheckRow(name, reference, None, None, None, None, "untested", reason, Stats())


def _estimators(
    recipe: Recipe, asked: Sequence[str] | None
) -> tuple[dict[str, Estimator], dict[str, str]]:
    """The estimators by name, the recipe's own with its options, the others with their defaults.

    Beside them those asked for by name that need what is missing, with the reason; raises
    `RequirementError` where that is all that was asked for.
    """
    own = recipe.content["estimator"]["name"]
    everything = [*registry.names("estimators"), *presets.of("estimators")]
    if asked == ["all"]:
        asked = None
    else:
        everything = everything[: len(registry.names("estimators"))]
    names = asked or list(dict.fromkeys([own, *everything]))
    chosen: dict[str, Estimator] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name == own:
            chosen[name] = recipe.estimator
            continue
        try:
            chosen[name] = build("estimators", name, "--estimators")
        except RequirementError as error:
            if not asked:
                complain(f"{name}: {error}", kind="left out: ")
                continue
            missing[name] = str(error)
        except RecipeError as error:
            if asked or name not in registry.foreign("estimators"):
                raise
            complain(f"{name}: {error}", kind="left out: ")
    if not chosen:
        raise RequirementError("; ".join(f"{name}: {why}" for name, why in missing.items()))
    return chosen, missing


def _print(console: Console, recipe: Recipe, rows: Sequence[CheckRow], quiet: bool = False) -> None:
    references = list(dict.fromkeys(row.reference for row in rows))
    text = f"{recipe.name}: dΦ/dx near the initial x, reference: {', '.join(references)}"
    console.print(text, markup=False, highlight=False)
    gap = 2 if all(len(row.name) <= LONGEST for row in rows) else 1

    def table(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
        shown = [head for head in COLUMNS if head not in left_out]
        for head in shown:
            side = "left" if head in WORDS else "right"
            made.add_column(head, justify=side, no_wrap=True, vertical="bottom")
        for row in rows:
            made.add_row(*(_cell(row, head) for head in shown))
        return made

    console.print()
    print_fitted(console, table, ("HVPs", "cosine", "differentiates"))
    if quiet:
        return
    console.print()
    console.print(_LEGEND, style="dim", highlight=False)
    if any(row.is_claim_alone for row in rows):
        console.print(CLAIM_ALONE, style="dim", highlight=False)
    settled = [row.name for row in rows if _is_settled_only(row)]
    if settled:
        console.print(
            f"{', '.join(settled)}: exact with all inner solves, and its own steps, settled; one call "
            "as configured, after the recipe's lower solve, is off by `err vs dΦ/dx`",
            highlight=False,
        )
    for row in rows:
        if row.note:
            console.print(Text.assemble((row.name, "bold"), f": {row.note}"))


def _cell(row: CheckRow, head: str) -> Text:
    return Text(COLUMNS[head](row), _STYLES.get(row.verdict, "") if head == "verdict" else "")


def _is_settled_only(row: CheckRow) -> bool:
    """Whether a claim that holds says little of the answer: exact, and a tenth off or more."""
    return row.verdict == "exact" and row.error is not None and row.error > 0.1


_PATH_LEGEND = (
    "cosine of the slopes of the hypergradient and the differences, ×ratio of their lengths. "
    "Differences of F(x, y_K(x)), K the recipe's own lower steps, after three lower solves."
)
_ROUGH_LEGEND = (
    "?: the differences change as their step is halved, {rough}: they are no truer than that, and what "
    "the estimator lacks is not told from it. So it is where the problem rounds more coarsely than "
    "float64, as layers do that compute in float32 whatever they are given."
)
_LEGEND = (
    "claim err: relative to the gradient of what it differentiates, all inner solves converged. "
    "err vs dΦ/dx: ‖h − dΦ/dx‖ / ‖dΦ/dx‖ as configured, after the recipe's own lower solve."
)
