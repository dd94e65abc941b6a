"""`study`: arms × seeds × regimes, tuned alike and compared with intervals; any part of it, by any number of processes."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Columns
from rich.text import Text

from bilevel.cli import study_cell, sweep_trial
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import Stopped, complain
from bilevel.cli.names import locate, names_in
from bilevel.cli.output import going_on
from bilevel.cli.signals import Signals
from bilevel.cli.tables import print_fitted
from bilevel.errors import RecipeError, unknown
from bilevel.recipe.assemble import assemble
from bilevel.recipe.seeds import parse_seeds
from bilevel.run import engine
from bilevel.runfolder import arithmetic
from bilevel.sinks.console import say
from bilevel.sinks.numbers import duration, significant
from bilevel.studying import figure, page
from bilevel.studying import file as files
from bilevel.studying.drive import StudyDriver, specification
from bilevel.studying.file import Study
from bilevel.studying.headroom import headroom
from bilevel.studying.plan import Asked, StudyPlan, Waiting
from bilevel.studying.results import Book, StudyCell
from bilevel.studying.summary import ArmRow, Findings, Table, document, findings

FAILED = 6
"""Exit code where some cells failed."""
PHASES = ("tune", "test")
AGAIN = ("failed", "altered")
SHOWN = 5


def study(
    console: Console,
    reference: str,
    *,
    regimes: str | None,
    arms: str | None,
    seeds: str | None,
    phase: str | None,
    again: str | None,
    workers: int,
    runs: Path,
    only_show: bool,
    insist: bool = False,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Run the cells that are missing, of those that are asked for; then show what all kept cells say, and write the page.

    An `answer` has {"study", "regimes": a table each, …}, as `bilevel.studying.summary.Findings` has them.
    """
    asked = files.read(locate(reference, "study"))
    plan = StudyPlan(asked, Book(asked.results))
    selection = _selection(asked, regimes, arms, seeds, phase)
    if again is not None and again not in AGAIN:
        raise RecipeError(f"--again {unknown(again, AGAIN, 'choice')}")
    _discard(plan, selection, again)
    failed = False
    if not only_show:
        if not insist:
            _refuse_without_headroom(plan, selection)
        if wanted := asked.content.arithmetic:
            arithmetic.require(wanted.instructions, wanted.threads)
        _check(plan, selection)
        _warn_of_other_arithmetic(plan, selection)
        driven = _driver(plan, selection, runs, workers, insist)
        failed = _compute(Console(quiet=True) if quiet else console, driven)
    found = findings(plan)
    if answer:
        answer.data = {"study": asked.name, **document(found)}
    _print(console, asked, found, quiet)
    for path in _write(asked, found):
        console.print(Text(f"{path}"), soft_wrap=True)
    if failed:
        raise Stopped(FAILED)


def _selection(
    asked: Study, regimes: str | None, arms: str | None, seeds: str | None, phase: str | None
) -> Asked:
    def names(option: str, given: str | None, known: Collection[str]) -> tuple[str, ...]:
        found = () if given is None else tuple(names_in(given, option))
        for name in found:
            if name not in known:
                raise RecipeError(f"{option} {unknown(name, known, option.strip('-'))}")
        return found

    chosen = parse_seeds(seeds) if seeds is not None else ()
    there = {*asked.development}.union(*asked.test.values())
    for seed in chosen:
        if seed not in there:
            raise RecipeError(f"--seeds {seed}: is no seed of {asked.path}")
    return Asked(
        names("--phase", phase, PHASES),
        names("--regime", regimes, asked.content.regimes),
        names("--arm", arms, asked.content.arms),
        chosen,
    )


def _discard(plan: StudyPlan, selection: Asked, again: str | None) -> None:
    """Take away what is to be computed again; raises `RecipeError` where cells were run with other settings."""
    altered = {cell: what for cell in plan.all() if (what := plan.altered(cell)) is not None}
    if altered and again != "altered":
        cell, what = next(iter(altered.items()))
        raise RecipeError(
            f"{plan.book.path(cell)}: was run with other settings than {plan.study.path} has now ({what}), as "
            f"were {len(altered)} cells in all. Put the file back as it was, give the study other results, or "
            "have them computed again: --again altered"
        )
    found = [*altered]
    if again == "failed":
        for cell in plan.all():
            kept = plan.book.get(cell)
            if kept is not None and not kept.is_done:
                found.append(cell)
    for cell in found:
        if cell in selection:
            plan.book.drop(cell)


def _check(plan: StudyPlan, selection: Asked) -> None:
    """Every arm that is to be run has a recipe that can be; raises what is wrong with the first that has not."""
    seen: set[tuple[str, str]] = set()
    for cell in plan.missing(selection):
        if (cell.regime, cell.arm) in seen:
            continue
        try:
            overrides = plan.overrides(cell)
        except Waiting:
            continue
        seen.add((cell.regime, cell.arm))
        try:
            engine.refuse_mismatch(assemble(plan.study.load(overrides)))
        except RecipeError as error:
            raise RecipeError(f"{plan.study.path}: {cell.regime}, {cell.arm}: {error}") from None


def _refuse_without_headroom(plan: StudyPlan, selection: Asked) -> None:
    """Raises `RecipeError` where every cell that is asked for would be held back."""
    gate, missing = headroom(plan), plan.missing(selection)
    if gate and missing and all(map(gate.holds, missing)):
        raise RecipeError(
            f"{plan.study.path}: {gate.said}. Nothing that is asked for is run before it is met: compute what "
            f"is missing (--phase tune --regime {gate.regime}), or go on all the same, which the page then "
            "says: --without-headroom"
        )


def _warn_of_other_arithmetic(plan: StudyPlan, selection: Asked) -> None:
    """Cells of a seed that was begun on another kind of machine will not be alike to the last digit."""
    here, regimes = arithmetic.here(), {cell.regime for cell in plan.missing(selection)}
    others = {
        kept.arithmetic
        for cell in plan.all()
        if cell.regime in regimes and (kept := plan.book.get(cell)) and kept.arithmetic
    } - {here}
    if others:
        complain(
            f"this machine computes with {here}, and cells that are there were computed with {'; '.join(sorted(others))}: "
            "the two may differ by more than arms do where training is long. `arithmetic:` in the study's file has all computed alike",
            kind="warning: ",
        )


def _driver(
    plan: StudyPlan, selection: Asked, runs: Path, workers: int, insist: bool
) -> StudyDriver:
    import torch

    wanted = plan.study.content.arithmetic
    threads = wanted.threads if wanted else max(1, torch.get_num_threads() // max(1, workers))

    def start(cell: StudyCell, overrides: list[str], place: Path) -> Any:
        spec = specification(plan.study.path.resolve(), cell, overrides, place)
        spec["threads"] = threads if workers > 1 or wanted else None
        if insist and (gate := headroom(plan)) and gate.holds(cell):
            spec["note"] = f"headroom {gate.verdict}"
        if workers:
            return sweep_trial.Process(spec, study_cell.main)
        return study_cell.in_this_process(spec)

    folder = runs / f"{plan.study.name}-study"
    return StudyDriver(plan, selection, folder, start, workers, insist)


def _compute(console: Console, driver: StudyDriver) -> bool:
    """Whether a cell failed, now or before."""
    driver.folder.mkdir(parents=True, exist_ok=True)
    with going_on(f"the study in {driver.folder}"), Signals():
        try:
            with Live(console=console, auto_refresh=False, transient=True) as view:
                for ended in driver.run():
                    if ended is not None:
                        _tell(console, driver, ended)
                    if console.is_terminal:
                        view.update(_running(driver), refresh=True)
        except Stopped as stopped:
            left = len(driver.missing())
            raise Stopped(
                stopped.code, f"stopped; {left} cells are left: the same command goes on"
            ) from None
    _leave(console, driver)
    plan = driver.plan
    kept = [plan.book.get(cell) for cell in plan.all() if cell in driver.selection]
    return any(each is not None and not each.is_done for each in kept)


def _tell(console: Console, driver: StudyDriver, cell: StudyCell) -> None:
    kept = driver.plan.book.get(cell)
    assert kept is not None
    measure = driver.plan.study.content.measure
    said = significant(kept.measures[measure]) if kept.is_done else f"failed: {kept.reason}"
    took = f" ({duration(kept.seconds)})" if kept.seconds else ""
    text = f"{len(driver.missing())} left  {cell}: {said}{took}"
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _running(driver: StudyDriver) -> Text:
    names = ", ".join(map(str, driver.running))
    return Text(f"{len(driver.missing())} left; running: {names}", style="bold")


def _leave(console: Console, driver: StudyDriver) -> None:
    """Say what was not run and why."""
    if driver.elsewhere:
        console.print(f"running in another process: {driver.elsewhere}", highlight=False)
    reasons = Counter(driver.waiting.values())
    for reason, number in reasons.most_common(SHOWN):
        say(console, f"{number} {'cells wait' if number > 1 else 'cell waits'}: {reason}")


def _print(console: Console, asked: Study, found: Findings, quiet: bool) -> None:
    """The regimes and the headroom; where it is to be `quiet`, of both what there is a result of."""
    for table in found.regimes:
        if table.done or not quiet:
            _show(console, asked, table, quiet)
    gate = found.headroom
    if gate and not (quiet and gate.verdict == "not yet computed"):
        console.print()
        console.print(gate.said, markup=False, highlight=False)


def _show(console: Console, asked: Study, table: Table, quiet: bool) -> None:
    content = asked.content
    failed = f", {table.failed} failed" if table.failed else ""
    way = "largest" if content.maximize else "smallest"
    console.print()
    title = f"{table.regime}: {table.title}" if table.title else table.regime
    console.print(title, style="bold", markup=False, highlight=False)
    if not table.cells:
        why = "" if table.named else ": ours and baseline, its arms, are not named yet"
        console.print(f"no cells{why}", highlight=False)
        return
    head = (
        f"{table.done} of {table.cells} cells are there{failed}; {content.measure}, {way} is best"
    )
    console.print(head, markup=False, highlight=False)
    if not table.done:
        return
    print_fitted(console, lambda left_out: _columns(table, left_out), SPARE)
    named = table.named.get(files.BASELINE)
    if named and not quiet:
        text = f"difference from {named}, the baseline named on development seeds, 95 % interval"
        console.print(text, style="dim", markup=False, highlight=False)


SPARE = ["gradients", "group", "tuned", "verdict"]
"""Columns that are left out where a terminal is narrow, the first first."""


def _columns(table: Table, left_out: Collection[str]) -> Columns:
    made = Columns(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    heads = ["arm", "group", "tuned", "seeds", "test", "difference", "verdict", "gradients"]
    shown = [head for head in heads if head not in left_out]
    for head in shown:
        is_number = head in ("tuned", "seeds", "test", "gradients")
        made.add_column(head, justify="right" if is_number else "left", no_wrap=True)
    for row in table.rows:
        cells = dict(zip(heads, _cells(row), strict=True))
        made.add_row(*(Text(cells[head]) for head in shown))
    return made


def _cells(row: ArmRow) -> Sequence[str]:
    return (
        row.arm,
        row.group,
        significant(row.tuned.mean) if row.tuned else "–",
        f"{len(row.seeds)}" + (f" −{len(row.failed)}" if row.failed else ""),
        significant(row.value.mean) if row.seeds else "–",
        page.difference(row.against) if row.against.n else "–",
        row.verdict or "–",
        significant(row.cost.gradients) if row.cost else "–",
    )


def _write(asked: Study, found: Findings) -> list[Path]:
    if asked.page is None:
        return []
    text = page.read(asked.page, page.parts(asked))
    if not figure.is_possible():
        complain("no figure: it needs matplotlib: pip install 'bilevel[report]'", kind="note: ")
        figures: list[Path] = []
    else:
        figures = figure.draw(asked, found, asked.page.parent / asked.page.stem)
    page.write(asked.page, page.filled(text, asked, found, figures, _command(asked)))
    return [asked.page, *figures]


def _command(asked: Study) -> str:
    return f"bilevel study {shlex.quote(str(asked.path))}"
