"""MLflow: a run in a database beside the runs, or on a server."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from bilevel.components import component
from bilevel.runfolder import files
from bilevel.sinks import tracking

ID = "mlflow_run_id"
"""The file of a run folder with the id that MLflow gave its run."""
LOCK = "mlflow.lock"
"""The file beside the database by which runs that begin at once wait for each other."""
STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PATIENCE = 1.0
"""Seconds that metrics are held back: a call for each step would take longer than a short step."""
MOST = 1000
"""Metrics that one call takes."""
LONGEST = 6000
"""Characters of a parameter's value that MLflow takes."""


def _without_password(uri: str) -> str:
    if "@" in urlsplit(uri).netloc:
        raise ValueError(
            "must have no password, which would be recorded; MLflow reads it from "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


@component
class MLflow:
    """A run of MLflow, by default in mlflow.db beside the folders of all runs, its figures in mlruns/.

    A resumed run goes on in it. `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows them.
    """

    tracking_uri: Annotated[str, AfterValidator(_without_password)] = ""
    """A server or a database; sqlite:///<runs>/mlflow.db by default."""
    experiment: str = ""
    """The recipe's name by default."""

    def require(self) -> None:
        """Raises `RequirementError` where a package is missing."""
        for module in ("mlflow", "sqlalchemy", "alembic"):
            tracking.require(module, "mlflow")

    @tracking.opening("mlflow")
    def open(self, folder: Path, step: int | None) -> tracking.TrackerReceiver:
        self.require()
        runs = folder.resolve().parent.parent
        uri = self.tracking_uri or f"sqlite:///{(runs / 'mlflow.db').as_posix()}"
        artifacts = None if self.tracking_uri else (runs / "mlruns").as_uri()
        name = self.experiment or tracking.project_name(folder)
        # MLflow makes the tables of a database, and an experiment, without a lock of its own
        with nullcontext() if self.tracking_uri else files.alone(runs / LOCK):
            client = _mlflow("tracking").MlflowClient(tracking_uri=uri, registry_uri=uri)
            run = _resumed(client, folder) or _created(client, folder, name, artifacts)
        return tracking.TrackerReceiver(
            "mlflow", MLflowRun(client, run), folder, step, repeats=True
        )


def _resumed(client: Any, folder: Path) -> str | None:
    """The run that an earlier process began, running again."""
    try:
        run = (folder / ID).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    client.update_run(run, status="RUNNING")
    return run


def _mlflow(part: str) -> Any:
    """A part of MLflow, which a type checker need not find: `make` installs no MLflow."""
    return import_module(f"mlflow.{part}")


def _created(client: Any, folder: Path, experiment: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment, artifacts)
    run = client.create_run(number, run_name=tracking.run_name(folder)).info.run_id
    files.write_text(folder / ID, run + "\n", remedy="make room, then resume the run")
    Param = _mlflow("entities").Param
    settings = tracking.flat(tracking.settings(folder)).items()
    params = [Param(key, str(value)[:LONGEST]) for key, value in settings]
    for begin in range(0, len(params), 100):  # as many as one call takes
        client.log_batch(run, params=params[begin : begin + 100])
    return run


class MLflowRun:
    """One run of MLflow. What it has of a step is not written again."""

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run
        self._last: dict[str, int] = {}
        self._held: list[Any] = []
        self._sent = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        Metric = _mlflow("entities").Metric
        now = int(time.time() * 1000)
        named = {_name(name): value for name, value in values.items()}
        self._held += [Metric(n, v, now, step) for n, v in named.items() if self._last_of(n) < step]
        is_late = time.monotonic() - self._sent > PATIENCE
        if is_late or len(self._held) > MOST:
            self._send()

    def _send(self) -> None:
        for begin in range(0, len(self._held), MOST):
            self._client.log_batch(self._run, metrics=self._held[begin : begin + MOST])
        self._held, self._sent = [], time.monotonic()

    def figure(self, step: int, name: str, figure: Any) -> None:
        self._client.log_figure(self._run, figure, f"figures/{_name(name)}.png")

    def text(self, step: int, name: str, text: str) -> None:
        self._client.set_tag(self._run, _name(name), f"step {step}: {text}")

    def end(self, status: tracking.Status) -> None:
        self._send()
        self._client.set_terminated(self._run, STATUS[status])

    def close(self) -> None:
        self._send()

    def _last_of(self, name: str) -> int:
        """The last step that the run has of a metric; what a crash left behind a checkpoint is there too."""
        if name not in self._last:
            history = self._client.get_metric_history(self._run, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]


def _name(name: str) -> str:
    """With the characters alone that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)
