"""`cp`: a recipe to change, as a file of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from bilevel.cli.names import SUFFIXES, locate
from bilevel.errors import RecipeError


def copy(console: Console, reference: str, destination: Path) -> None:
    """Copy a recipe to a file or into a folder; never onto a file that is there."""
    source = locate(reference)
    target = destination / source.name if destination.is_dir() else destination
    if target.suffix not in SUFFIXES:
        target = target.with_name(f"{target.name}.yaml")
    if target.exists():
        raise RecipeError(f"{target}: is there already; remove it or name another file")
    if not target.parent.is_dir():
        raise RecipeError(f"{target.parent}: there is no such folder")
    shutil.copyfile(source, target)
    console.print(f"{target}   run it: bilevel run {target}", highlight=False, soft_wrap=True)
