"""`cp`: a recipe to change, as a file of one's own."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from bilevel import recipe as recipes
from bilevel.cli.names import SCHEMA_KEY, SUFFIXES, locate, schema_path
from bilevel.errors import RecipeError
from bilevel.runfolder import files

_BESIDE = f"{SCHEMA_KEY}recipe.schema.json\n"
"""What a shipped recipe says of the schema beside it; a copy lies elsewhere."""


def copy(console: Console, reference: str, destination: Path) -> None:
    """Copy a recipe to a file or into a folder; never onto a file that is there."""
    source = locate(reference)
    target = destination / source.name if os.path.isdir(destination) else destination
    if target.suffix not in SUFFIXES and not os.path.lexists(target):
        target = target.with_name(f"{target.name}.yaml")
    if os.path.lexists(target):
        raise RecipeError(f"{target}: is there already; remove it or name another file")
    if not os.path.isdir(target.parent):
        raise RecipeError(f"{target.parent}: there is no such folder")
    text = recipes.read(source).replace(_BESIDE, f"{SCHEMA_KEY}{schema_path()}\n")
    files.write_text(target, text, remedy="make room, or name another place")
    console.print(f"{target}   run it: bilevel run {target}", highlight=False, soft_wrap=True)
