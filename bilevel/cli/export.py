"""`export`: the model of a run, in a folder that other programs read."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bilevel import recipe as recipes
from bilevel import runfolder
from bilevel.cli.boundary import complain, requiring
from bilevel.cli.user_code import explaining
from bilevel.errors import CheckpointError, RecipeError
from bilevel.problem.levels import Levels
from bilevel.recipe.assemble import assemble
from bilevel.recipe.settings import refuse_other, settings
from bilevel.run import engine
from bilevel.runfolder import checkpoint
from bilevel.sinks.console import ConsoleReceiver


def export(
    console: Console, reference: str, runs: Path, to: Path, merged: bool, best: bool = False
) -> None:
    """Write what a run learned, as of its newest whole checkpoint or the `best`, by the problem's `export`.

    Raises `RecipeError` for a problem without one, and `CheckpointError` for a run without a
    checkpoint or a folder that is not empty. Where it fails `to` is not there afterwards.
    """
    folder = runfolder.find(reference, runs)
    recipe = recipes.load(folder.resolved)
    if "export" not in Levels(recipe.problem):
        raise RecipeError(
            f"{folder.path}: problem {recipe.content['problem']['name']} has no `export(x, y, "
            "folder, merged)`; its variables are in the checkpoints: "
            f"{folder.checkpoints}/…/tensors.safetensors"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}: is not an empty folder; name a new one with --to")
    found = checkpoint.latest(folder.best if best else folder.checkpoints)
    if found is None and best:
        raise CheckpointError(
            f"{folder.path}: keeps no best checkpoint: its recipe has no checkpoint.best, e.g. "
            "{measure: accuracy, mode: max}; leave --best out for the newest"
        )
    if found is None:
        raise CheckpointError(f"{folder.path}: has no checkpoint yet; resume it first")
    for reason in found.skipped:
        complain(f"passed over {reason}", kind="warning: ")
    refuse_other(found.settings, settings(recipe.content), found.path)
    setup = assemble(recipe)
    shown = ConsoleReceiver(console)
    try:
        with explaining(), requiring(f"problem {type(recipe.problem).__name__}"):
            for event in engine.prepare(setup):
                shown.receive(event)
            state = engine.restore(setup, checkpoint.load(found.path))
            # of the setup's problem: one whose variables are nested is another by now
            with setup.seeded("export"):
                setup.levels.optional["export"](state.x, state.y, to, merged)
    except BaseException:  # `to` was empty or not there: half a model helps nobody
        shutil.rmtree(to, ignore_errors=True)
        raise
    finally:
        shown.close()
    console.print(Text(f"{to}/  step {found.step}"), soft_wrap=True)
