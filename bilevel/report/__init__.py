"""The report of a run: one HTML file that needs no network, made from the run folder alone.

`history` reads the record, `charts` draws, `page` puts both into the template. No problem, no
estimator and no tensor is seen here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bilevel.errors import CheckpointError, RequirementError
from bilevel.runfolder import files
from bilevel.runfolder.folder import RunFolder

NEEDED = ("altair", "vl_convert", "jinja2")


def missing() -> tuple[str, ...]:
    """The packages of the extra `report` that are not installed."""
    return tuple(name for name in NEEDED if find_spec(name) is None)


def write(folder: RunFolder) -> Path:
    """Write report.html into a run folder, replacing an earlier one; returns its path.

    Raises `RequirementError` without the extra `report`, `RecipeError` where there is no record,
    `CheckpointError` where the report cannot be written; an earlier one is then as it was.
    """
    if absent := missing():
        raise RequirementError(f"a report needs {', '.join(absent)}: pip install 'bilevel[report]'")
    from bilevel.report.page import render

    remedy = "make room, or make the folder writable, then run `bilevel report` again"
    try:
        page = render(folder)
    except OSError as error:
        raise CheckpointError(f"{folder.path}: cannot be read: {error}") from error
    files.write_text(folder.report, page, remedy=remedy)
    return folder.report
