"""`runs rm`: runs deleted with a question; never a running one, nor anything outside the folder of runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from bilevel.cli.selection import chosen, folders, listed
from bilevel.errors import CheckpointError, RecipeError
from bilevel.runfolder.folder import RunFolder

SHOWN = 20
"""Runs that the question names."""


def remove(
    console: Console,
    references: Sequence[str],
    runs: Path,
    where: Sequence[str],
    *,
    without_question: bool,
) -> None:
    """Delete the runs that are named and meet every condition.

    Raises `RecipeError`, and deletes nothing, where one is running, lies elsewhere or is a link.
    """
    if not references and not where:
        raise RecipeError("name the runs to delete, or say which with --where")
    found = folders(chosen(listed(runs, references), where))
    if not found:
        raise RecipeError(f"no run in {runs}/ is so; `bilevel runs` lists them")
    for folder in found:
        _refuse(folder, runs)
    if not without_question:
        for folder in found[:SHOWN]:
            console.print(str(folder.path), markup=False, highlight=False, soft_wrap=True)
        if len(found) > SHOWN:
            console.print(f"and {len(found) - SHOWN} more", highlight=False)
        typer.confirm(f"Delete {_number(len(found))}?", abort=True)
    for folder in found:
        _delete(folder)
    console.print(f"deleted {_number(len(found))}", highlight=False)


def _refuse(folder: RunFolder, runs: Path) -> None:
    """Raise `RecipeError` for what may not be deleted: only runs/<name>/<run>, and no link on the way."""
    path = folder.path
    is_below = path.parent.parent.resolve() == runs.resolve()
    is_below = is_below and ".." not in (path.name, path.parent.name)
    if not is_below or os.path.islink(path) or os.path.islink(path.parent):
        raise RecipeError(
            f"{path}: is not a run folder in {runs}/, or is a link to elsewhere: not deleted. "
            "--runs-dir names another folder of runs"
        )
    if folder.is_locked():
        raise RecipeError(f"{path}: is running: not deleted. Stop it first")


def _delete(folder: RunFolder) -> None:
    try:
        with folder.lock():
            # by which a folder is known as a run: what is left of it, if this is killed, is none
            folder.resolved.unlink()
            shutil.rmtree(folder.path)
        if not any(folder.path.parent.iterdir()):
            folder.path.parent.rmdir()
    except OSError as error:
        raise CheckpointError(f"{folder.path}: cannot be deleted: {error.strerror}") from error


def _number(count: int) -> str:
    return f"{count} run" + ("" if count == 1 else "s")
