"""`seeds` in a recipe: a run a seed, each in a folder of its own, and means over them in the end.

    runs/<name>/<time>-<hash6>/          ensemble.yaml, by which it is known; report.html of all seeds
    runs/<name>/<time>-<hash6>-seed<N>/  a run like any other

A seed whose run diverges or fails costs its own row.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel import report
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import Stopped, complain
from bilevel.cli.one_run import Given, begin_in, resume_in, unchanged
from bilevel.cli.output import going_on
from bilevel.cli.shown import Showing, showing
from bilevel.cli.signals import Signals
from bilevel.cli.tables import print_fitted
from bilevel.errors import BilevelError, ConvergenceError, UserCodeError
from bilevel.events import COMPLETE
from bilevel.recipe import recipe as recipes
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.report.seeds import Mean, mean
from bilevel.runfolder import RunFolder, record
from bilevel.runfolder.folder import ENSEMBLE, RECIPE, RESOLVED
from bilevel.sinks.numbers import interval

FAILED = 6
"""Exit code where the runs of some seeds failed."""


def begin(
    console: Console,
    recipe: Recipe,
    given: Given,
    runs: Path,
    with_report: bool,
    quiet: bool,
    answer: JSONAnswer | None,
) -> None:
    """Run every seed of a recipe; raises `Stopped` with 6 where some failed."""
    whole = given.create(runs, recipe, kind=ENSEMBLE)
    _drive(console, recipe, given, whole, with_report, quiet, answer)


def resume(
    console: Console,
    whole: RunFolder,
    with_report: bool,
    quiet: bool,
    answer: JSONAnswer | None,
) -> None:
    """Go on with an ensemble: seeds that are done stand, the others go on or begin."""
    recipe, _ = unchanged(whole, whole.path / ENSEMBLE)
    about = whole.environment()
    command, overrides = about.get("command", []), about.get("overrides", [])
    given = Given(
        recipes.read(whole.path / RECIPE), overrides, command[: len(command) - len(overrides)]
    )
    _drive(console, recipe, given, whole, with_report, quiet, answer)


def find(reference: str, runs: Path) -> RunFolder | None:
    """The ensemble in the folder that is named, or the newest run of a name where it is of one."""
    for path in (Path(reference), runs / reference):
        if (path / ENSEMBLE).is_file():
            return RunFolder(path)
        if (path / RESOLVED).is_file():
            return None
        below = [*path.glob(f"*/{RESOLVED}"), *path.glob(f"*/{ENSEMBLE}")]
        if below:
            newest = max(below, key=lambda each: (each.parent.name[:15], each.stat().st_mtime_ns))
            whole = newest.parent.with_name(newest.parent.name.partition("-seed")[0])
            return RunFolder(whole) if (whole / ENSEMBLE).is_file() else None
    return None


def run_of(whole: RunFolder, seed: int) -> RunFolder:
    """The folder of a seed's run."""
    return RunFolder(whole.path.with_name(f"{whole.path.name}-seed{seed}"))


def _drive(
    console: Console,
    recipe: Recipe,
    given: Given,
    whole: RunFolder,
    with_report: bool,
    quiet: bool,
    answer: JSONAnswer | None,
) -> None:
    failed: dict[int, str] = {}
    with whole.lock(), going_on(f"the ensemble in {whole.path}"), Signals():
        for number, seed in enumerate(recipe.seeds, start=1):
            head = Text(f"seed {seed} ({number} of {len(recipe.seeds)})", style="bold")
            if not quiet:
                console.print(head)
            try:
                run_seed(
                    console, recipe, given, whole, seed, with_report, showing(quiet, answer), answer
                )
            except Stopped as stopped:
                done = len(_done(whole, recipe.seeds))
                raise Stopped(
                    stopped.code,
                    f"stopped at seed {seed}, {done} of {len(recipe.seeds)} are done. "
                    f"Go on: bilevel resume {whole.path}",
                ) from None
            except (ConvergenceError, UserCodeError) as error:
                failed[seed] = str(error)
                complain(f"seed {seed}: {error}")
        _conclude(console, recipe, whole, failed, with_report, answer)
    if failed:
        raise Stopped(FAILED, f"{len(failed)} of {len(recipe.seeds)} seeds failed")


def run_seed(
    console: Console,
    recipe: Recipe,
    given: Given,
    whole: RunFolder,
    seed: int,
    with_report: bool,
    shown: Showing,
    answer: JSONAnswer | None = None,
    signals: Signals | None = None,
) -> RunFolder:
    """Begin the run of a seed beside `whole`, or go on with it; nothing is done where it is done."""
    folder = run_of(whole, seed)
    if not folder.resolved.is_file():
        shutil.rmtree(folder.path, ignore_errors=True)  # of a process killed as it made it
        one = recipe.at(seed)
        kept = [each for each in given.overrides if not each.startswith(("seeds=", "seed="))]
        given = Given(given.text, [*kept, f"seed={seed}"], given.command)
        parent = folder.path.parent
        given.create(parent.parent, one, name=parent.name, stem=folder.path.name)
        begin_in(console, one, assemble(one), folder, with_report, shown, answer, signals)
    elif not is_done(folder):
        resume_in(console, folder, with_report, shown, answer, signals)
    else:
        console.print(Text(f"{folder.path}/ is done", style="dim"), soft_wrap=True)
    return folder


def is_done(folder: RunFolder) -> bool:
    finished = folder.finished() if folder.resolved.is_file() else None
    return finished is not None and finished["reason"] in COMPLETE


def _done(whole: RunFolder, seeds: Sequence[int]) -> list[RunFolder]:
    return [folder for seed in seeds if is_done(folder := run_of(whole, seed))]


def measures(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What a run came to, by name: before, after, and with x held."""
    found: dict[str, dict[str, float]] = {}
    stepped = [event for event in record.read(folder.path) if event["event"] == "stepped"]
    if stepped:
        ends = (("before", stepped[0]), ("after", stepped[-1]))
        found["upper loss F"] = {k: record.number(each["upper_loss"]) for k, each in ends}
    for event in record.read(folder.path):
        kind = {"evaluated": "after", "held": "x held"}.get(event["event"])
        for name, value in event["metrics"].items() if kind else ():
            row = found.setdefault(name, {})
            is_first = kind == "after" and not event["step"]
            row["before" if is_first else str(kind)] = record.number(value)
    return found


def means(folders: Sequence[RunFolder]) -> dict[str, dict[str, Mean]]:
    """The measures of runs, each the mean over them with its interval."""
    each = [measures(folder) for folder in folders]
    names = dict.fromkeys(name for found in each for name in found)
    return {
        name: {
            kind: mean([found[name][kind] for found in each if kind in found.get(name, {})])
            for kind in KINDS
            if any(kind in found.get(name, {}) for found in each)
        }
        for name in names
    }


KINDS = ("before", "after", "x held")


def _conclude(
    console: Console,
    recipe: Recipe,
    whole: RunFolder,
    failed: Mapping[int, str],
    with_report: bool,
    answer: JSONAnswer | None,
) -> None:
    folders = _done(whole, recipe.seeds)
    found = means(folders)
    if answer:
        answer.data["ensemble"] = {
            "folder": str(whole.path),
            "seeds": list(recipe.seeds),
            "failed": {str(seed): reason for seed, reason in failed.items()},
            "measures": {
                name: {kind: vars(value) for kind, value in row.items()}
                for name, row in found.items()
            },
        }
    console.print()
    said = f"{recipe.name}, {len(folders)} of {len(recipe.seeds)} seeds; mean ± 95 % interval"
    console.print(said, markup=False, highlight=False)
    if found:
        _print(console, found)
    if with_report and recipe.report and folders and not report.missing():
        _report(console, recipe, whole, folders)


def _print(console: Console, found: Mapping[str, Mapping[str, Mean]]) -> None:
    kinds = [kind for kind in KINDS if any(kind in row for row in found.values())]

    def table(left_out: Collection[str]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        made.add_column("measure", no_wrap=True)
        for kind in (kind for kind in kinds if kind not in left_out):
            made.add_column(kind, justify="right", no_wrap=True)
        for name, row in found.items():
            cells = [
                interval(row[kind].mean, row[kind].half) if kind in row else "–"
                for kind in kinds
                if kind not in left_out
            ]
            made.add_row(Text(name), *cells)
        return made

    print_fitted(console, table, [kind for kind in ("before", "x held") if kind in kinds])


def _report(
    console: Console, recipe: Recipe, whole: RunFolder, folders: Sequence[RunFolder]
) -> None:
    named = [str(folder.path) for folder in folders]
    made_by = " ".join(["bilevel", "report", *named, "-o", str(whole.report)])
    try:
        path = report.write_many(folders, whole.report, title=recipe.name, made_by=made_by)
    except (BilevelError, OSError) as error:
        complain(f"no report: {error}", kind="warning: ")
    else:
        console.print(Text(f"{path}"), soft_wrap=True)
