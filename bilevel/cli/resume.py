"""`resume`: a run as if it had never been stopped."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from rich.console import Console

from bilevel import recipe as recipes
from bilevel import runfolder
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import complain
from bilevel.cli.run_loop import RunLoop
from bilevel.cli.shown import Shown, conclude, showing
from bilevel.errors import RecipeError
from bilevel.events import COMPLETE, EARLY
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.recipe.settings import added_since, differences, refuse_other, settings_of_run
from bilevel.recipe.yaml_source import parse
from bilevel.run.setup import Setup
from bilevel.runfolder import RunFolder, checkpoint


def resume(
    console: Console,
    reference: str,
    runs: Path,
    with_report: bool = True,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Resume a run from its newest whole checkpoint, or from the start if it has none.

    An `answer` is that of `run`; the events are those from the checkpoint on.
    """
    if answer:
        answer.data = {"event": "result", "runs": []}
    folder = runfolder.find(reference, runs)
    finished = folder.finished()
    if finished and finished["reason"] in COMPLETE:
        early = finished["reason"] == EARLY
        raise RecipeError(
            f"{folder.path}: this run {'has stopped early' if early else 'is done'} "
            f"({finished['step']} steps). For more steps, run its recipe again: bilevel run "
            f"{folder.resolved} {'evaluate.stop=null' if early else 'upper.steps=…'}"
        )
    about = folder.environment()
    recipe = recipes.load(folder.resolved)
    written = parse(recipes.read(folder.resolved), str(folder.resolved)).data
    added = added_since(recipe.content, written)
    differ = differences(about.get("settings"), settings_of_run(recipe.content), added)
    if differ:
        raise RecipeError(
            f"{folder.resolved}: it, or a file that it names, was changed since the run began: "
            f"{differ}. So it cannot go on as if never stopped. Put it back, or start a new run: "
            f"bilevel run {folder.resolved}"
        )
    setup = assemble(recipe)
    try:
        with folder.lock():
            _go_on(console, recipe, setup, folder, added, with_report, showing(quiet, answer))
    finally:
        conclude(answer, folder)


def _go_on(
    console: Console,
    recipe: Recipe,
    setup: Setup,
    folder: RunFolder,
    added: Collection[str],
    with_report: bool,
    shown: Callable[[Console, dict[str, float] | None], Shown],
) -> None:
    found = checkpoint.latest(folder.checkpoints)
    for reason in found.skipped if found else ():
        complain(f"passed over {reason}", kind="warning: ")
    loop = RunLoop(console, recipe, setup, folder, with_report, shown)
    if found:
        refuse_other(found.settings, loop.settings, found.path, added)
    loop.resume(found)
