"""Weights & Biases: a run kept in the run folder, sent to its server where that is asked for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bilevel.components import component
from bilevel.errors import reason_of
from bilevel.runfolder import record
from bilevel.sinks import tracking

FOLDER = "wandb"
EXIT = {"done": 0, "stopped": 130, "failed": 1}
"""The exit codes by which W&B calls a run finished or failed."""

HELD_BACK = 1.0
"""Seconds that W&B may hold back what it was told: a run that is killed loses no more than that. 15 is its own."""
PATIENCE = 20
"""Seconds that a server has to answer before a run is written offline."""


@component
class WandB:
    """A W&B run in wandb/ of the run folder; `wandb sync` sends one that was written offline.

    It has the id of the run folder, so that a resumed run goes on in it. The key is taken from where W&B
    keeps it, and from no recipe; no command line, machine, code or repository is recorded.
    """

    project: str = ""
    """The recipe's name by default."""
    entity: str = ""
    """A user or team of the server; the key's own by default."""
    mode: Literal["offline", "online"] = "offline"
    """Online without a key or a server the run is written offline, with one warning."""
    tags: tuple[str, ...] = ()

    def require(self) -> None:
        """Raises `RequirementError` where the package is missing."""
        tracking.require("wandb", "wandb")

    @tracking.opening("wandb")
    def open(self, folder: Path, step: int | None) -> tracking.TrackerReceiver:
        self.require()
        import wandb

        caution, unsent = "", _unsent(folder, step)
        if self.mode == "online":
            try:
                run = self._begin(folder, "online")
            except wandb.Error as error:
                caution = (
                    f"wandb: {reason_of(error).rstrip('.')}; the run is written offline, and sent by "
                    f"wandb sync {folder / FOLDER}/offline-run-*"
                )
            else:
                return tracking.TrackerReceiver(
                    "wandb", WandBRun(run), folder, step, repeats=bool(unsent)
                )
        for old in unsent:
            shutil.rmtree(old)
        # what was not sent is written again, from the record
        opened = tracking.TrackerReceiver(
            "wandb", WandBRun(self._begin(folder, "offline")), folder, step, repeats=bool(unsent)
        )
        opened.caution = caution
        return opened

    def _begin(self, folder: Path, mode: Literal["offline", "online"]) -> Any:
        import wandb

        return wandb.init(
            project=self.project or tracking.project_name(folder),
            entity=self.entity or None,
            id=re.sub(r"[^\w-]", "-", tracking.run_name(folder)),
            name=tracking.run_name(folder),
            dir=str(folder),
            mode=mode,
            resume="allow",
            reinit="create_new",
            tags=list(self.tags) or None,
            config=tracking.settings(folder),
            settings=wandb.Settings(
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
                console="off",
                silent=True,
                x_transaction_log_flush_interval=HELD_BACK,
                init_timeout=PATIENCE,
                login_timeout=PATIENCE,
            ),
        )


def _unsent(folder: Path, step: int | None) -> list[Path]:
    """Folders of an offline run that no server has, and that can be written again."""
    if step is not None and not (folder / record.FILE).is_file():
        return []
    found = (folder / FOLDER).glob("offline-run-*")
    return [path for path in found if path.is_dir() and not list(path.glob("*.synced"))]


class WandBRun:
    """One run of W&B. Its steps only go up, and a row is whole once the next begins."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._exit = EXIT["stopped"]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(tracking.picture(figure))}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.summary[name] = f"step {step}: {text}"

    def end(self, status: tracking.Status) -> None:
        self._run.summary["status"] = status
        self._exit = EXIT[status]

    def close(self) -> None:
        self._run.finish(exit_code=self._exit)
