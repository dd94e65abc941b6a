"""`validate`: is a recipe valid, and if not, all that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from bilevel import recipe as recipes
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.names import locate
from bilevel.errors import ProblemError, RecipeError
from bilevel.problem.signatures import misspelt
from bilevel.recipe.assemble import assemble
from bilevel.recipe.settings import code
from bilevel.run.refusals import refuse_mismatch


def validate(
    console: Console, reference: str, overrides: Sequence[str], answer: JSONAnswer | None = None
) -> None:
    """Load a recipe; says that it is valid, or raises with all that is wrong in it, or why a run would refuse it.

    An `answer` has {"valid", "file", "hash", "code": [files of the user's own], "problems": [a line on each],
    "warnings": [a line on each]}.
    """
    lists = {name: list[str]() for name in ("code", "problems", "warnings")}
    found: dict[str, Any] = {"valid": False, "file": None, "hash": None, **lists}
    if answer:
        answer.data = found
    try:
        path = locate(reference)
        found["file"] = str(path)
        recipe = recipes.load(path, overrides)
        # what is valid where there is a device of its kind is valid
        setup = assemble(replace(recipe, runtime=replace(recipe.runtime, device="cpu")))
        refuse_mismatch(setup)
    except (RecipeError, ProblemError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        found["problems"] = lines[1:] or lines
        raise
    found |= {"valid": True, "hash": recipe.hash, "code": [*code(recipe.content)]}
    found["warnings"] = misspelt(setup.problem)
    text = f"{path}: valid (hash {recipe.hash[:12]})"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    for file in found["code"]:
        console.print(f"  runs code of {file}", markup=False, highlight=False, soft_wrap=True)
    for line in found["warnings"]:
        console.print(f"  warning: {line}", markup=False, highlight=False, soft_wrap=True)
