"""Pages of runs, each one HTML file that needs no network, made from run folders alone.

`history` reads a record, `charts` draws it, `page` is the page of one run. `arms` sorts many runs by what
differs, `seeds` takes means over them, `curves` draws these, `several` is their page. `estimators` has the pages
of `compare` and `check`. `template` inlines scripts, `pictures` figures. No problem, no estimator and no tensor is seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError, RequirementError
from bilevel.runfolder import files
from bilevel.runfolder.folder import RunFolder

REMEDY = "make room, or name a place that can be written to, then write it again"
NEEDED = ("altair", "vl_convert", "jinja2")


def missing() -> tuple[str, ...]:
    """The packages of the extra `report` that are not installed."""
    return tuple(name for name in NEEDED if find_spec(name) is None)


def write(folder: RunFolder) -> Path:
    """Write report.html into a run folder, replacing an earlier one; returns its path.

    Raises `RequirementError` without the extra `report`, `RecipeError` where there is no record,
    `CheckpointError` where the report cannot be written; an earlier one is then as it was.
    """
    _require()
    from bilevel.report.page import render

    try:
        page = render(folder)
    except OSError as error:
        raise CheckpointError(f"{folder.path}: cannot be read: {error}") from error
    files.write_text(folder.report, page, remedy=REMEDY)
    return folder.report


def write_many(folders: Sequence[RunFolder], to: Path, *, title: str, made_by: str) -> Path:
    """Write the page of many runs to a file, replacing one that is there; returns its path.

    A run that cannot be read costs its own row. Raises `RequirementError` without the extra
    `report`, `CheckpointError` where the page cannot be written.
    """
    _require()
    from bilevel.report.several import render

    files.write_text(to, render(folders, title, made_by), remedy=REMEDY)
    return to


def write_comparison(folder: Path) -> Path:
    """Write compare.html into the folder of a comparison, from its compare.json and its figure.

    Raises `RequirementError` without the extra `report`, `CheckpointError` where compare.json is
    damaged or the page cannot be written.
    """
    _require()
    from bilevel.report.estimators import compare_page

    source, to = folder / "compare.json", folder / "compare.html"
    try:
        page = compare_page(files.parse(source.read_bytes()), folder / "error-cost.png")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: cannot be read: {error!r}; run the comparison again, what is done is kept"
        ) from error
    files.write_text(to, page, remedy=REMEDY)
    return to


def write_check(document: Mapping[str, Any], to: Path) -> Path:
    """Write the page of what `check` found to a file; raises as `write_many` does."""
    _require()
    from bilevel.report.estimators import check_page

    files.write_text(to, check_page(document), remedy=REMEDY)
    return to


def _require() -> None:
    if absent := missing():
        raise RequirementError(f"a report needs {', '.join(absent)}: pip install 'bilevel[report]'")
