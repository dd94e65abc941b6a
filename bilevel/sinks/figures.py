"""Figures that the problem draws, as PNG for the report and SVG for a paper."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt

from bilevel.components import component
from bilevel.errors import CheckpointError, ProblemError
from bilevel.events import Drawn, Event
from bilevel.sinks import svg

FOLDER = "figures"


@component
class Figures:
    """Every `Drawn` figure as figures/<name>.png and .svg; a later step replaces an earlier one."""

    dpi: PositiveInt = 150

    def open(self, folder: Path, step: int | None) -> FigureWriter:
        return FigureWriter(folder / FOLDER, self.dpi)


@dataclass(frozen=True)
class FigureWriter:
    """Writes into `folder`, which is made with the first figure."""

    folder: Path
    dpi: int

    def receive(self, event: Event) -> None:
        if not isinstance(event, Drawn):
            return
        try:
            self._write(event)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the figure {event.name!r} cannot be written: {error.strerror}; "
                "make room, then resume the run"
            ) from error

    def close(self) -> None: ...

    def _write(self, event: Drawn) -> None:
        if not hasattr(event.figure, "savefig"):
            raise ProblemError(
                f"the problem's figures must be matplotlib figures; {event.name!r} is a "
                f"{type(event.figure).__name__}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "_", event.name)
        event.figure.savefig(self.folder / f"{name}.png", dpi=self.dpi, bbox_inches="tight")
        svg.save(event.figure, self.folder / f"{name}.svg", bbox_inches="tight")
