"""Executes the notebooks of the site: `python -m docs.execute` writes them with their outputs.

The site shows the outputs that are kept, and executes nothing. A test executes all of them again, and
compares what they print.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
LIMIT = 300
"""Seconds for a cell."""
MEASURED = "measured"
"""The tag of a cell whose table has seconds and bytes: of it ranks, names and counts are compared.

These numbers also say how wide its columns are, and with that which of them there is room for.
"""
RELATIVE, ABSOLUTE = 0.02, 1e-6
"""How far numbers may lie apart that are computed on two machines; what is smaller is rounding."""
_LEFT_OUT = re.compile(r"\x1b\[[\d;]*m|\b\d[\d.hmd]*s\b")
"""Colours and durations."""
_COUNTS = re.compile(r"^\d+ \w+|\b\d+/\d+/\d+\b", re.MULTILINE)


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"), reverse=True)  # the first problem first


def executed(notebooks: Sequence[Any], folder: Path) -> list[Any]:
    """The notebooks with new outputs, all of them by one kernel, which works in `folder`.

    Raises `nbclient.exceptions.CellExecutionError` where a cell does.
    """
    together = nbformat.v4.new_notebook(cells=[c for each in notebooks for c in each.cells])
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of `!bilevel`
    environment = {**os.environ, "PATH": beside, "COLUMNS": "88", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        together,
        timeout=LIMIT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return [*notebooks]  # whose cells are those of `together`


def printed(cell: Any) -> str:
    """What a cell printed and returned, as text."""
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text") or output.get("data", {}).get("text/plain") or "")
    return "\n".join(texts)


def differences(kept: Any, found: Any) -> Iterator[str]:
    """Where a cell printed other words, or numbers further apart than by rounding.

    Colours and durations are left out, and of a cell with the tag `MEASURED` all that it measured.
    """
    measured = MEASURED in kept.metadata.get("tags", [])
    pick = _COUNTS.findall if measured else str.split
    before, after = (pick(_LEFT_OUT.sub("", printed(cell))) for cell in (kept, found))
    if len(before) != len(after):
        yield f"{len(after)} words, {len(before)} are kept"
    for old, new in zip(before, after, strict=False):
        if old != new and not _close(old, new):
            yield f"{new}, kept is {old}"
    kinds = [[sorted(output.get("data", {})) for output in cell.outputs] for cell in (kept, found)]
    if kinds[0] != kinds[1]:
        yield f"outputs of the kinds {kinds[1]}, kept are {kinds[0]}"


def _close(old: str, new: str) -> bool:
    try:
        return math.isclose(float(old), float(new), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except ValueError:
        return False


def main() -> None:
    notebooks = [nbformat.read(path, 4) for path in paths()]
    with tempfile.TemporaryDirectory() as folder:
        for path, notebook in zip(paths(), executed(notebooks, Path(folder)), strict=True):
            nbformat.write(notebook, path)
            print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
