"""TensorBoard: event files in the run folder, which `tensorboard --logdir runs` shows beside those of other runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.components import component
from bilevel.runfolder import record
from bilevel.sinks import tracking

FOLDER = "tensorboard"


@component
class TensorBoard:
    """Scalars, figures, warnings and the recipe's settings (tab HParams) as tensorboard/events.out.tfevents.*.

    A resumed run writes another file, with the record up to its checkpoint; it voids those before it. Settings are
    those of runs that are over: one that was interrupted has none until it is.
    """

    def require(self) -> None:
        """Raises `RequirementError` where the package is missing."""
        tracking.require("tensorboard", "tensorboard")

    @tracking.opening("tensorboard")
    def open(self, folder: Path, step: int | None) -> tracking.TrackerReceiver:
        self.require()
        from torch.utils.tensorboard import SummaryWriter

        repeats = (folder / record.FILE).is_file()
        purge = 0 if repeats or step is None else step + 1
        again = (folder / FOLDER).is_dir()
        writer = SummaryWriter(str(folder / FOLDER), purge_step=purge if again else None)
        tracker = TensorBoardRun(writer, tracking.settings(folder))
        return tracking.TrackerReceiver("tensorboard", tracker, folder, step, repeats=repeats)


class TensorBoardRun:
    """One run as an open event file."""

    def __init__(self, writer: Any, recipe: Mapping[str, Any]) -> None:
        self._writer, self._recipe = writer, recipe
        self._last: dict[str, float] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._last |= values

    def figure(self, step: int, name: str, figure: Any) -> None:
        pixels = tracking.picture(figure)[..., :3]
        self._writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def end(self, status: tracking.Status) -> None:
        """The settings and the last measures, in the same file: `add_hparams` would make a run of its own.

        Not of a run that may go on: TensorBoard shows those that it finds first.
        """
        if status == "stopped":
            return
        from torch.utils.tensorboard.summary import hparams

        flat = tracking.flat(self._recipe) | {"status": status}
        known = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flat.items()
        }
        result = {n: v for n, v in self._last.items() if n.startswith(("eval/", "upper/"))}
        for summary in hparams(known, result):
            self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        self._writer.close()
