"""One cell of a study: a run through what `bilevel run` uses, and of it what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel.cli.boundary import Stopped
from bilevel.cli.ensemble import run_seed
from bilevel.cli.one_run import Given
from bilevel.errors import BilevelError, reason_of
from bilevel.recipe import recipe as recipes
from bilevel.runfolder import RunFolder, arithmetic
from bilevel.sinks.console import ConsoleReceiver
from bilevel.studying import file as files
from bilevel.studying.results import Book, Kept, StudyCell, collect
from bilevel.sweeping import drive

UNSEEN = ("evaluate.before=false", "evaluate.figures=false")
"""What a run may leave out of which nothing is kept; a study that sets it has its way."""


def run_cell(spec: Mapping[str, Any], console: Console) -> None:
    """Run a cell, or go on with it, and keep what it came to; the run's folder is then taken away.

    A run that fails is kept as failed, with the reason and its folder. Raises `Stopped` where it was told to stop;
    the same call goes on later.
    """
    study, cell = files.read(Path(spec["study"])), StudyCell(**spec["cell"])
    overrides, content = list(spec["overrides"]), study.content
    whole = RunFolder(Path(spec["place"]) / "run")
    try:
        run = [*UNSEEN, *overrides, "report=false"]
        recipe = study.load(run)
        given = Given(recipes.read(study.recipe), run, ("bilevel", "run", str(study.recipe)))
        folder = run_seed(console, recipe, given, whole, recipe.seed, False, ConsoleReceiver)
        names = [n for each in content.regimes[cell.regime].course.values() for n in each]
        found = collect(folder.path, content.measure, content.keep, content.cases, names)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, BilevelError) else f"{type(error).__name__}: "
        reason = f"{kind}{' '.join(str(error).split()) or reason_of(error)}"[:500]
        failed = Kept("failed", tuple(overrides), {}, {}, 0.0, reason, note=spec.get("note"))
        Book(study.results).keep(cell, failed)
        return
    if cell.phase == "tune":
        found = replace(found, cases=None)  # the mean is all that is chosen by
    found = replace(
        found, assignments=tuple(overrides), note=spec.get("note"), arithmetic=arithmetic.here()
    )
    Book(study.results).keep(cell, found)
    shutil.rmtree(folder.path, ignore_errors=True)


def in_this_process(spec: Mapping[str, Any]) -> drive.Over:
    """Run a cell here and now."""
    with (Path(spec["place"]) / drive.SAID).open("w", encoding="utf-8") as file:
        run_cell(spec, Console(file=file, width=100))
    return drive.Over()


def main(spec: Mapping[str, Any]) -> None:
    """Run a cell in a process of its own."""
    run_cell(spec, Console(width=100))
