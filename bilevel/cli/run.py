"""`run`: a recipe in a new run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bilevel import recipe as recipes
from bilevel import runfolder
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.names import locate
from bilevel.cli.run_loop import RunLoop
from bilevel.cli.shown import conclude, showing
from bilevel.recipe.assemble import assemble
from bilevel.recipe.settings import settings_of_run
from bilevel.run import engine


def run(
    console: Console,
    reference: str,
    overrides: Sequence[str],
    runs: Path,
    *,
    dry: bool = False,
    with_report: bool = True,
    quiet: bool = False,
    answer: JSONAnswer | None = None,
) -> None:
    """Run a recipe in a new folder below `runs`.

    For an `answer` each event is a line; it has what `shown.conclude` says.
    """
    if answer:
        answer.data = {"event": "result", "runs": []}
    path = locate(reference)
    recipe = recipes.load(path, overrides)
    setup = assemble(recipe)
    engine.refuse_mismatch(setup)
    if dry:
        if answer:
            answer.data |= {"recipe": recipe.content, "hash": recipe.hash}
        console.print(recipe.dump().rstrip(), markup=False, highlight=False, soft_wrap=True)
        note = f"# hash {recipe.hash[:12]}, device {setup.device}; nothing was run"
        console.print(note, markup=False, highlight=False)
        return
    text = recipes.read(path)
    folder = runfolder.create(
        runs,
        recipe.name,
        recipe.hash,
        text=text,
        resolved=recipe.dump(),
        overrides=overrides,
        environment={
            "command": ["bilevel", "run", reference, *overrides],
            "settings": settings_of_run(recipe.content),
            **runfolder.environment(),
        },
    )
    try:
        with folder.lock():
            RunLoop(console, recipe, setup, folder, with_report, showing(quiet, answer)).begin()
    finally:
        conclude(answer, folder)
