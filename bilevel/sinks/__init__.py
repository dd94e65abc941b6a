"""Where events go. A sink is a frozen component; `open` begins its record in a run folder.

`jsonl` is the record, `rows` what measures were computed from, `figures` what a problem drew,
`console` the progress that is shown; `tensorboard`, `wandb`, `mlflow` and `trackio` keep copies in
trackers (`tracking`); `svg` writes a figure. A sink sees events and nothing of the run behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.events import Event
    from bilevel.sinks.figures import Figures as Figures
    from bilevel.sinks.jsonl import JSONLines as JSONLines
    from bilevel.sinks.mlflow import MLflow as MLflow
    from bilevel.sinks.rows import RowFiles as RowFiles
    from bilevel.sinks.tensorboard import TensorBoard as TensorBoard
    from bilevel.sinks.trackio import Trackio as Trackio
    from bilevel.sinks.wandb import WandB as WandB
else:
    __getattr__, __dir__ = exports(__name__, "sinks")


@runtime_checkable
class Receiver(Protocol):
    """Takes the events of one run in their order; `close` is called once, whatever happened."""

    def receive(self, event: Event) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Opens a receiver in the folder of a run.

    `step` is the checkpoint that the run resumes from: what was recorded after it never
    happened. None for a run that begins.
    """

    def open(self, folder: Path, step: int | None) -> Receiver: ...
