"""What measures were computed from, as JSON lines: one file a table, one line a case.

Numbers are written as in the record, `bilevel.runfolder.record`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bilevel.components import component
from bilevel.errors import CheckpointError
from bilevel.events import Event, Tabulated
from bilevel.runfolder import record

FOLDER = "rows"
START = "start"


@component
class RowFiles:
    """Tables as rows/<name>.jsonl, those of the last evaluation; step 0 also in rows/start/."""

    def open(self, folder: Path, step: int | None) -> RowWriter:
        return RowWriter(folder / FOLDER)


@dataclass(frozen=True)
class RowWriter:
    """Writes into `folder`, which is made with the first table."""

    folder: Path

    def receive(self, event: Event) -> None:
        if not isinstance(event, Tabulated):
            return
        file = re.sub(r"[^\w.-]+", "_", event.name) + ".jsonl"
        text = "".join(map(record.line, event.rows))
        try:
            _write(self.folder / file, text)
            if event.step == 0:
                _write(self.folder / START / file, text)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the rows {event.name!r} cannot be written: {error.strerror}; "
                "make room, then resume the run"
            ) from error

    def close(self) -> None: ...


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
