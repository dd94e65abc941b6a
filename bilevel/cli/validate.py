"""`validate`: is a recipe valid, and if not, all that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from bilevel import recipe as recipes
from bilevel.cli.names import locate


def validate(console: Console, reference: str, overrides: Sequence[str]) -> None:
    """Load a recipe; says that it is valid, or raises with all that is wrong in it."""
    path = locate(reference)
    recipe = recipes.load(path, overrides)
    text = f"{path}: valid (hash {recipe.hash[:12]})"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
