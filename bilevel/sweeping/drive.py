"""Trials are started, waited for and told. Any number of processes may drive one sweep.

A driver holds the lock of each trial that it runs, and asks for a new one under the lock of the folder. A
trial that the journal has as running and whose lock is free was left by a driver that died or was stopped: it
is taken up, and its runs go on from their checkpoints. A trial's process that dies costs that trial alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bilevel.errors import CheckpointError
from bilevel.runfolder.files import parse, write_text
from bilevel.runfolder.folder import RunFolder
from bilevel.sweeping.request import REMEDY, Request
from bilevel.sweeping.study import distributions, tell

if TYPE_CHECKING:
    import optuna

RESULT = "result.json"
SAID = "output.txt"
PAUSE = 0.1
"""Seconds between two looks at what runs."""

STATES = ("done", "pruned", "failed")


class Handle(Protocol):
    """A trial that was started."""

    def ended(self) -> str | None:
        """None while it runs; then "" or how its process died."""
        ...

    def stop(self) -> None:
        """Have it save its state and end; `wait` returns when it has."""
        ...

    def wait(self) -> None: ...


Start = Callable[[Mapping[str, Any]], Handle]
"""Starts a trial from its specification: number, id, values and folder."""


@dataclass(frozen=True)
class Ended:
    """A trial has come to its end."""

    number: int
    values: Mapping[str, Any]
    result: Mapping[str, Any]
    """status (done, pruned or failed), value, half, seeds, seconds, reason."""


@dataclass
class Driver:
    """Runs the trials of a sweep that are not done, at most `workers` at a time."""

    request: Request
    folder: Path
    study: optuna.Study
    start: Start
    trials: int
    workers: int = 1
    stops_on_error: bool = False
    running: dict[int, tuple[Handle, ExitStack, Mapping[str, Any]]] = field(default_factory=dict)
    is_stopped: bool = False

    def run(self) -> Iterator[Ended | None]:
        """What has ended, one by one; None now and then in between, so that what runs can be shown."""
        try:
            while True:
                while len(self.running) < max(1, self.workers) and self._begin():
                    yield from self._ended()
                if not self.running:
                    return
                yield from self._ended()
                yield None
                if self.running:
                    time.sleep(PAUSE)
        finally:
            leave(self.running)

    def elsewhere(self) -> int:
        """Trials that another process is at."""
        return len(self._unfinished())

    def _unfinished(self) -> list[optuna.trial.FrozenTrial]:
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _begin(self) -> bool:
        """Take up a trial that was left, or ask for a new one; False where there is none to begin."""
        if self.is_stopped:
            return False
        with ExitStack() as asking:
            hold(self.folder, asking, patient=True)
            for left in self._unfinished():
                if left.params.keys() != {each.key for each in self.request.space}:
                    # its driver was killed between two of its lines in the journal
                    self._tell(left.number, {"status": "failed", "reason": "killed as it was made"})
                elif left.number not in self.running and self._take(left):
                    return True
            if len(self.study.get_trials(deepcopy=False)) >= self.trials:
                return False
            trial = self.study.ask(distributions(self.request.space))
            (found,) = (each for each in self._unfinished() if each.number == trial.number)
            return self._take(found)

    def _take(self, trial: optuna.trial.FrozenTrial) -> bool:
        place = self.folder / "trials" / f"{trial.number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        if not hold(place, held) or self._is_busy(trial.number):
            held.close()
            return False
        spec = {
            "number": trial.number,
            "id": trial._trial_id,
            "values": dict(trial.params),
            "folder": str(self.folder),
            "place": str(place),
        }
        try:
            handle = Over() if (place / RESULT).is_file() else self.start(spec)
        except BaseException:
            held.close()
            raise
        self.running[trial.number] = (handle, held, trial.params)
        return True

    def _is_busy(self, number: int) -> bool:
        """Whether a process that has lost its driver still saves its run."""
        runs = self.folder.glob(f"trial-{number:04d}-seed*")
        return any(RunFolder(path).is_locked() for path in runs)

    def _ended(self) -> Iterator[Ended]:
        for number, (handle, held, values) in list(self.running.items()):
            died = handle.ended()
            if died is None:
                continue
            result = _result(self.folder / "trials" / f"{number:04d}", died)
            self._tell(number, result)
            del self.running[number]
            held.close()
            if result["status"] == "failed" and self.stops_on_error:
                self.is_stopped = True
            yield Ended(number, values, result)

    def _tell(self, number: int, result: Mapping[str, Any]) -> None:
        (trial,) = (each for each in self._unfinished() if each.number == number)
        store = self.study._storage
        for key in ("status", "value", "half", "seeds", "seconds", "reason"):
            if result.get(key) is not None:
                store.set_trial_user_attr(trial._trial_id, key, result[key])
        value = result["value"] if result["status"] == "done" else None
        tell(self.study, number, value, _state(result["status"]))


class Over:
    """A trial that ended before its driver could tell so."""

    def ended(self) -> str | None:
        return ""

    def stop(self) -> None: ...

    def wait(self) -> None: ...


def _state(status: str) -> Any:
    from optuna.trial import TrialState

    return {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[
        status
    ]


def _result(place: Path, died: str) -> dict[str, Any]:
    """What a trial's process left, or that it died."""
    try:
        found = parse((place / RESULT).read_bytes())
        if found["status"] in STATES:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"status": "failed", "reason": died or "its process ended with no result"}


def write_result(place: Path, result: Mapping[str, Any]) -> None:
    """Keep what became of a trial, whole or not at all."""
    write_text(place / RESULT, json.dumps(result, ensure_ascii=False) + "\n", remedy=REMEDY)


def leave(running: MutableMapping[Any, tuple[Handle, ExitStack, Any]]) -> None:
    """What still runs saves its state; it is kept as unfinished, and is taken up later."""
    for handle, _, _ in running.values():
        handle.stop()
    for handle, held, _ in running.values():
        handle.wait()
        held.close()
    running.clear()


def hold(folder: Path, held: ExitStack, patient: bool = False) -> bool:
    """Hold a folder until `held` is closed; whether it could be had."""
    while True:
        try:
            held.enter_context(RunFolder(folder).lock())
            return True
        except CheckpointError as error:
            if not patient or "another process" not in str(error):
                if "another process" in str(error):
                    return False
                raise
            time.sleep(PAUSE / 5)
