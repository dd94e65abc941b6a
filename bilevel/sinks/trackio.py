"""Trackio: a run in a database beside the runs, which its own dashboard shows."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from bilevel.components import component
from bilevel.sinks import tracking

FOLDER = "trackio"
PLACE = "TRACKIO_DIR"
"""The variable by which Trackio is told where to write; it is read once, as Trackio is imported."""


@component
class Trackio:
    """A run of Trackio in trackio/ beside the folders of all runs, or in $TRACKIO_DIR.

    A resumed run goes on in it. `TRACKIO_DIR=runs/trackio trackio show` shows them. Nothing is sent anywhere.
    """

    project: str = ""
    """The recipe's name by default."""

    def require(self) -> None:
        """Raises `RequirementError` where the package is missing."""
        tracking.require("trackio", "trackio")

    @tracking.opening("trackio")
    def open(self, folder: Path, step: int | None) -> tracking.TrackerReceiver:
        self.require()
        trackio = _imported(folder.resolve().parent.parent)
        project = re.sub(r"[^\w-]", "-", self.project or tracking.project_name(folder))
        with redirect_stdout(io.StringIO()):  # where it writes, and how to look at it
            run = trackio.init(
                project,
                tracking.run_name(folder),
                config=tracking.settings(folder),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        run.config["_Username"] = None
        return tracking.TrackerReceiver("trackio", TrackioRun(run), folder, step, repeats=True)


def _imported(runs: Path) -> Any:
    """Trackio, writing where $TRACKIO_DIR says, or below `runs`; where it is imported already, as it does."""
    is_free = "trackio" not in sys.modules and not os.environ.get(PLACE)
    if is_free:
        os.environ[PLACE] = str(runs / FOLDER)
    try:
        return import_module("trackio")  # which a type checker need not find: `make` installs none
    finally:
        if is_free:
            del os.environ[PLACE]


class TrackioRun:
    """One run of Trackio. What it has of a step, and an alert that it has, are not written again."""

    def __init__(self, run: Any) -> None:
        self._run = run
        storage = import_module("trackio.sqlite_storage").SQLiteStorage
        self._last: dict[str, int] = {}
        for row in storage.get_logs(run.project, run.name, run_id=run.id):
            self._last |= {name: max(row["step"], self._last.get(name, -1)) for name in row}
        alerts = storage.get_alerts(run.project, run_name=run.name, run_id=run.id)
        self._alerted = {(alert["title"], alert["step"]) for alert in alerts}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if self._last.get(name, -1) < step}
        if new:
            self._run.log(new, step=step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        picture = import_module("trackio").Image(tracking.picture(figure))
        self._run.log({f"figures/{name}": picture}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._alert("ERROR" if name == "end" else "WARN", step, name, text)

    def end(self, status: tracking.Status) -> None:
        self._alert("ERROR" if status == "failed" else "INFO", None, "status", status)

    def close(self) -> None:
        current = import_module("trackio.context_vars").current_run
        with redirect_stdout(io.StringIO()):
            self._run.finish()
        if current.get() is self._run:
            current.set(None)  # it would be finished again, and say so, as the process ends

    def _alert(self, level: str, step: int | None, name: str, text: str) -> None:
        if (name, step) in self._alerted:
            return
        with redirect_stdout(io.StringIO()):
            levels = import_module("trackio").AlertLevel
            self._run.alert(name, text, level=levels[level], step=step)
