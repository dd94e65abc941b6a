"""One trial of a sweep: its seeds one after the other, through what `bilevel run` uses, watched for pruning."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bilevel.cli.boundary import Stopped
from bilevel.cli.ensemble import run_seed
from bilevel.cli.one_run import Given
from bilevel.cli.shown import Measured
from bilevel.cli.signals import Signals
from bilevel.comparing import processes
from bilevel.errors import BilevelError
from bilevel.events import Evaluated, Event, Stepped
from bilevel.recipe import recipe as recipes
from bilevel.report.seeds import mean
from bilevel.runfolder import RunFolder, record
from bilevel.sinks.console import ConsoleReceiver
from bilevel.sweeping import drive
from bilevel.sweeping import study as studies

LOSSES = ("upper_loss", "lower_loss", "hypergradient_norm")
"""Measures that every step says, whatever the problem's own are."""
REPORTS = 20
"""Times that a run tells how it stands, of a measure that every step says."""
PRUNED = "pruned"
Work = Callable[[Mapping[str, Any]], None]
"""What a process does with its specification: "place", "threads" and its own."""


@dataclass
class Watcher:
    """Takes the events of a run: tells the journal how it stands, and ends it where the pruner says so."""

    spec: Mapping[str, Any]
    before: Sequence[float]
    """The measure of the seeds that are done: a trial stands where the mean so far does."""
    steps: int
    study: Any
    signals: Signals = field(default_factory=Signals)
    is_pruned: bool = False
    inner: Any = None

    def showing(self, console: Console, measured: Measured) -> Watcher:
        self.inner = ConsoleReceiver(console, measured)
        return self

    def receive(self, event: Event) -> None:
        self.inner.receive(event)
        value = self._value(event)
        if value is None or not math.isfinite(value):
            return
        store, trial = self.study._storage, self.spec["id"]
        at = len(self.before) * self.steps + event.step  # pyright: ignore[reportAttributeAccessIssue]
        if at in store.get_trial(trial).intermediate_values:
            return  # told before it was resumed
        store.set_trial_intermediate_value(trial, at, mean([*self.before, value]).mean)
        if self.study.pruner.prune(self.study, store.get_trial(trial)):
            self.is_pruned = True
            self.signals.ask(PRUNED)

    def _value(self, event: Event) -> float | None:
        measure = self.spec["measure"]
        if measure not in LOSSES:
            is_measured = isinstance(event, Evaluated) and event.step
            return event.metrics.get(measure) if is_measured else None  # pyright: ignore
        if isinstance(event, Stepped) and event.step % max(1, self.steps // REPORTS) == 0:
            return getattr(event, measure)
        return None

    def stopping(self) -> None:
        self.inner.stopping()

    def close(self) -> None:
        self.inner.close()


def run_trial(spec: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """What became of a trial: status, value (the mean over its seeds), half, seeds, seconds, reason.

    Raises `Stopped` where it was told to stop; the same call goes on later.
    """
    began, watcher, seed = time.perf_counter(), None, None
    values: list[float] = []
    try:
        recipe = recipes.loads(spec["recipe"], spec["assignments"], title=spec["title"])
        given = Given(spec["text"], [*spec["overrides"], *spec["assignments"]], spec["command"])
        whole = RunFolder(Path(spec["folder"]) / f"trial-{spec['number']:04d}")
        study = _study(spec)
        for seed in recipe.seeds:
            watcher = Watcher(spec, tuple(values), recipe.upper.steps, study)
            options: Any = {"shown": watcher.showing, "signals": watcher.signals}
            folder = run_seed(console, recipe, given, whole, seed, False, **options)
            values.append(measured(folder, spec["measure"]))
    except Stopped:
        if watcher is None or not watcher.is_pruned:
            raise
        return _ended("pruned", values, began)
    except (Exception, SystemExit) as error:
        said = str(error).partition("\n")[0] if str(error) else type(error).__name__
        kind = "" if isinstance(error, BilevelError) else f"{type(error).__name__}: "
        where = "" if seed is None else f"seed {seed}: "
        return _ended("failed", values, began) | {"reason": f"{where}{kind}{said}"[:500]}
    return _ended("done", values, began)


def measured(folder: RunFolder, measure: str) -> float:
    """The measure at the end of a run, from its record. Raises `ValueError` where it is not a number."""
    kind = "stepped" if measure in LOSSES else "evaluated"
    event = record.last(folder.path, kind) or {}
    value = event.get(measure) if measure in LOSSES else event.get("metrics", {}).get(measure)
    number = record.number(value)
    if not math.isfinite(number):
        raise ValueError(f"{measure} is {value} at the end of the run")
    return number


def _study(spec: Mapping[str, Any]) -> Any:
    import optuna

    store = studies.storage(Path(spec["folder"]))
    chosen = studies.pruner_of(spec["pruner"])
    return optuna.load_study(study_name=studies.NAME, storage=store, pruner=chosen)


def _ended(status: str, values: Sequence[float], began: float) -> dict[str, Any]:
    found = mean(values)
    return {
        "status": status,
        "value": found.mean if values and status == "done" else None,
        "half": found.half,
        "seeds": list(values),
        "seconds": time.perf_counter() - began,
        "reason": None,
    }


class Process:
    """A trial, or other `work`, in a process that is forked from a warm server."""

    def __init__(self, spec: Mapping[str, Any], work: Work | None = None) -> None:
        self._said = Path(spec["place"]) / drive.SAID
        context = processes.context(__name__, "optuna")
        self._process = context.Process(target=_main, args=(dict(spec), work or _trial))
        self._process.start()

    def ended(self) -> str | None:
        if self._process.is_alive():
            return None
        self._process.join()
        code = self._process.exitcode
        return "" if code == 0 else processes.death(code, self._said)

    def stop(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.join()


def in_this_process(spec: Mapping[str, Any]) -> drive.Over:
    """Run a trial here and now: for a debugger. One that crashes takes the sweep with it."""
    place = Path(spec["place"])
    with (place / drive.SAID).open("w", encoding="utf-8") as file:
        drive.write_result(place, run_trial(spec, Console(file=file, width=100)))
    return drive.Over()


def on_a_cluster(spec: Mapping[str, Any]) -> None:
    """Run a trial as a task of a cluster. One that is told to stop leaves no result, and is taken up later."""
    import torch

    torch.set_num_threads(spec["threads"])
    with suppress(Stopped):
        in_this_process(spec)


def _main(spec: dict[str, Any], work: Work) -> None:
    processes.detach(str(Path(spec["place"]) / drive.SAID))
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    if spec["threads"]:
        import torch

        torch.set_num_threads(spec["threads"])
    try:
        work(spec)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None


def _trial(spec: Mapping[str, Any]) -> None:
    drive.write_result(Path(spec["place"]), run_trial(spec, Console(width=100)))


def _end_with_the_driver() -> None:
    """A driver that is killed cannot say so: its trials save their state as on SIGTERM."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
