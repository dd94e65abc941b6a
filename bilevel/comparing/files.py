"""The JSON that a comparison is kept in; each file is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.errors import CheckpointError
from bilevel.runfolder import files, record

REMEDY = "make room, or name another folder with --runs-dir; what is done is kept"


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Strict JSON; numbers that are not finite become null.

    Raises `CheckpointError` where it cannot be written.
    """
    text = json.dumps(
        record.strict(data, lambda _: None), indent=2, ensure_ascii=False, allow_nan=False
    )
    files.write_text(path, text + "\n", remedy=REMEDY, make_folder=True)


def read(path: Path) -> dict[str, Any]:
    """Raises `CheckpointError` where it is cut off, altered or cannot be read."""
    try:
        found = files.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; remove it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is not a mapping: it was altered; remove it")
    return found
