"""`report`: the page of one run in its folder, or of many runs in a file; imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bilevel.cli.selection import chosen, folders, listed
from bilevel.errors import RecipeError
from bilevel.report import write, write_comparison, write_many
from bilevel.runfolder.folder import find


def report(references: Sequence[str], runs: Path, to: Path | None, where: Sequence[str]) -> Path:
    """Write a page and return its path.

    Without `to` it is that of one run, the newest of a name, or of a comparison. With it, every name and pattern stands
    for all its runs, and nothing for all there are. Raises `RecipeError` where none is left.
    """
    if to is None:
        if len(references) != 1 or where:
            raise RecipeError(
                "a page of many runs is a file of its own: name it with -o report.html"
            )
        for folder in (Path(references[0]), runs / references[0]):
            if (folder / "compare.json").is_file():
                return write_comparison(folder)
        return write(find(references[0], runs))
    found = chosen(listed(runs, references), where)
    if not found:
        raise RecipeError(f"no run in {runs}/ is asked for; `bilevel runs` lists them")
    names = list(dict.fromkeys(each.summary.name for each in found))
    conditions = [part for each in where for part in ("--where", each)]
    place = [] if runs == Path("runs") else ["--runs-dir", str(runs)]
    made_by = ["bilevel", "report", *references, *conditions, *place, "-o", str(to)]
    if to.is_dir():
        to = to / "report.html"
    return write_many(folders(found), to, title=", ".join(names), made_by=shlex.join(made_by))
