"""`run`: a recipe in a new run folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from bilevel import recipe as recipes
from bilevel.cli import ensemble
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.boundary import complain
from bilevel.cli.follow import follow
from bilevel.cli.member import Member
from bilevel.cli.names import locate
from bilevel.cli.one_run import Given, begin_in
from bilevel.cli.profiling import profiling
from bilevel.cli.shown import showing
from bilevel.cli.signals import Signals
from bilevel.errors import RecipeError
from bilevel.problem.signatures import misspelt
from bilevel.recipe.assemble import assemble
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
    profile: bool = False,
    answer: JSONAnswer | None = None,
    member: Member | None = None,
) -> None:
    """Run a recipe in a new folder below `runs`; one with `seeds` in a folder a seed.

    As a `member` of several ranks that are to compute it, where there are.

    `profile` says where the time goes (`bilevel.cli.profiling`).
    For an `answer` each event is a line; it has what `shown.conclude` says.
    """
    if answer:
        answer.data = {"event": "result", "runs": []}
    path = locate(reference)
    recipe = recipes.load(path, overrides)
    ranks = (member or Member()).join(recipe.runtime)
    setup = assemble(recipe, ranks)
    engine.refuse_mismatch(setup)
    spread = () if ranks.is_alone else ("--ranks", str(ranks.size))
    given = Given(recipes.read(path), overrides, ("bilevel", "run", reference, *spread))
    if profile and recipe.is_ensemble:
        raise RecipeError(
            "--profile is of one run, and this recipe has seeds: give one, as in seed=0"
        )
    if recipe.is_ensemble and not ranks.is_alone:
        raise RecipeError(
            f"{ranks.size} ranks compute one run, and this recipe has seeds: give one, as in seed=0, "
            "or run it on one rank"
        )
    if recipe.is_ensemble and not dry:
        ensemble.begin(console, recipe, given, runs, with_report, quiet, answer)
        return
    if dry:
        warnings = misspelt(setup.problem)
        for line in warnings:
            complain(line, kind="warning: ")
        if answer:
            answer.data |= {"recipe": recipe.content, "hash": recipe.hash, "warnings": warnings}
        console.print(recipe.dump().rstrip(), markup=False, highlight=False, soft_wrap=True)
        note = f"# hash {recipe.hash[:12]}, device {setup.device}; nothing was run"
        console.print(note, markup=False, highlight=False)
        return
    signals = member.signals if member else None
    if not ranks.is_first:
        follow(setup, signals or Signals())
        return
    folder = given.create(runs, recipe, ranks=ranks.size)
    with profiling(console, folder.path) if profile else nullcontext():
        begin_in(
            console, recipe, setup, folder, with_report, showing(quiet, answer), answer, signals
        )
