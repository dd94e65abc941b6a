"""What measures were computed from, as JSON lines: one file a table, one line a case.

Numbers are written as in the record, `bilevel.runfolder.record`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bilevel.components import component
from bilevel.events import Event, Tabulated
from bilevel.runfolder import files, record

FOLDER = "rows"
START = "start"
REMEDY = "make room, then resume the run"


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
        folders = [self.folder, self.folder / START] if event.step == 0 else [self.folder]
        for folder in folders:
            files.write_text(folder / file, text, remedy=REMEDY, make_folder=True)

    def close(self) -> None: ...
