"""One run in its folder, as `run`, `resume`, an ensemble and a sweep begin it and go on with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bilevel import recipe as recipes
from bilevel import runfolder
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import complain
from bilevel.cli.follow import follow
from bilevel.cli.member import Member
from bilevel.cli.run_loop import RunLoop
from bilevel.cli.shown import Showing, conclude
from bilevel.cli.signals import Signals
from bilevel.errors import RecipeError
from bilevel.recipe.assemble import assemble
from bilevel.recipe.recipe import Recipe
from bilevel.recipe.settings import added_since, code, differences, refuse_other, settings_of_run
from bilevel.recipe.yaml_source import parse
from bilevel.run.setup import Setup
from bilevel.runfolder import RunFolder, checkpoint


@dataclass(frozen=True)
class Given:
    """What a person gave, as it stands in a run folder beside what was made of it."""

    text: str
    overrides: Sequence[str]
    command: Sequence[str]
    """Without the overrides."""

    def create(
        self,
        runs: Path,
        recipe: Recipe,
        *,
        name: str | None = None,
        ranks: int = 1,
        **options: str,
    ) -> RunFolder:
        """A new run folder, begun by so many ranks; options are those of `runfolder.create`."""
        shard = recipe.runtime.mesh.shard
        return runfolder.create(
            runs,
            name or recipe.name,
            recipe.hash,
            text=self.text,
            resolved=recipe.dump(),
            overrides=self.overrides,
            environment={
                "command": [*self.command, *self.overrides],
                "settings": settings_of_run(recipe.content),
                "code": code(recipe.content),
                "ranks": ranks,
                "mesh": {"data": ranks // shard, "shard": shard},
                **runfolder.environment(),
            },
            **options,
        )


def begin_in(
    console: Console,
    recipe: Recipe,
    setup: Setup,
    folder: RunFolder,
    with_report: bool,
    shown: Showing,
    answer: JSONAnswer | None = None,
    signals: Signals | None = None,
) -> None:
    """Run a recipe in a folder that was made for it."""
    try:
        with folder.lock():
            RunLoop(
                console, recipe, setup, folder, with_report, shown, signals or Signals()
            ).begin()
    finally:
        conclude(answer, folder)


def resume_in(
    console: Console,
    folder: RunFolder,
    with_report: bool,
    shown: Showing,
    answer: JSONAnswer | None = None,
    signals: Signals | None = None,
    member: Member | None = None,
) -> None:
    """Go on with the run in a folder, which must not have been changed since it began.

    As a `member` of several ranks, where there are; the first of them finds the checkpoint.
    """
    recipe, added = unchanged(folder, folder.resolved)
    setup = assemble(recipe, (member or Member()).join(recipe.runtime), resumed=True)
    signals = signals or Signals()
    if not setup.ranks.is_first:
        follow(setup, signals, setup.ranks.from_first())
        return
    try:
        with folder.lock():
            _go_on(RunLoop(console, recipe, setup, folder, with_report, shown, signals), added)
    finally:
        conclude(answer, folder)


def unchanged(folder: RunFolder, path: Path) -> tuple[Recipe, Collection[str]]:
    """The recipe in a folder, and which of its settings are newer than it.

    Raises `RecipeError` where it, or a file that it names, is another than when the run began.
    """
    about = folder.environment()
    recipe = recipes.load(path)
    written = parse(recipes.read(path), str(path)).data
    added = added_since(recipe.content, written)
    differ = differences(about.get("settings"), settings_of_run(recipe.content), added)
    if differ:
        raise RecipeError(
            f"{path}: it, or a file that it names, was changed since the run began: "
            f"{differ}. So it cannot go on as if never stopped. Put it back, or start a new run: "
            f"bilevel run {path}"
        )
    return recipe, added


def _go_on(loop: RunLoop, added: Collection[str]) -> None:
    found = checkpoint.latest(loop.folder.checkpoints)
    for reason in found.skipped if found else ():
        complain(f"passed over {reason}", kind="warning: ")
    if other := runfolder.other_arithmetic(loop.folder.environment(), runfolder.environment()):
        complain(
            f"begun with {other}: from here on the same to rounding, not to the bit", "warning: "
        )
    if found:
        refuse_other(found.settings, loop.settings, found.path, added)
    loop.setup.ranks.from_first(found and found.path)
    loop.resume(found)
