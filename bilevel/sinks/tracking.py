"""What a tracker is told of a run: the record in names that users of trackers know, the same in each.

    upper/loss, lower/loss       F and G before the step        eval/<measure>      the problem's measures
    hypergradient/norm           ‖dΦ/dx‖                        control/<measure>   those with x held
    hypergradient/residual, …    evidence, where there is any   oracle/gradients, oracle/hvps, …  calls so far
    lower/gradient_norm          of G at y                      time/step           seconds

A step is an upper step. The record stays `events.jsonl`; a tracker has a copy. One that fails in the middle
of a run (a full disk, a network that is gone) is left out from there on, with one warning, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from ruamel.yaml import YAML

from bilevel.errors import (
    BilevelError,
    CheckpointError,
    RequirementError,
    TrackerError,
    reason_of,
)
from bilevel.events import (
    COMPLETE,
    Drawn,
    Event,
    Finished,
    Progress,
    Saved,
    Started,
    Tabulated,
    Traced,
    Warned,
)
from bilevel.runfolder import record
from bilevel.runfolder.folder import RESOLVED
from bilevel.sinks.jsonl import plain

_STEPPED = {
    "upper/loss": ("upper_loss",),
    "lower/loss": ("lower_loss",),
    "lower/gradient_norm": ("lower", "gradient_norm"),
    "hypergradient/norm": ("hypergradient_norm",),
    "hypergradient/residual": ("estimate", "residual"),
    "hypergradient/condition": ("estimate", "condition"),
    "hypergradient/error_bound": ("estimate", "error_bound"),
    "oracle/gradients": ("totals", "gradients"),
    "oracle/hvps": ("totals", "hvps"),
    "oracle/cross_products": ("totals", "cross_products"),
    "time/step": ("seconds",),
}
Status = Literal["done", "stopped", "failed"]


class Tracker(Protocol):
    """One run in a tracker, new or continued."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def figure(self, step: int, name: str, figure: Any) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def end(self, status: Status) -> None:
        """The run ended; it is called at most once, and may be left out by a crash."""

    def close(self) -> None: ...


class TrackerReceiver:
    """Tells a tracker the events of one run.

    `step` is the checkpoint that the run resumes from. What the record has up to there is told first, where
    the tracker `repeats`: a crash may have lost what it still held back.
    """

    def __init__(
        self, name: str, tracker: Tracker, folder: Path, step: int | None, *, repeats: bool
    ) -> None:
        self._name, self._tracker = name, tracker
        self.caution = ""
        """What a person is told once it is open."""
        self._told: set[tuple[str, Any]] = set()
        for event in () if step is None else recorded(folder, step):
            self._told.add(_key(event))
            if repeats:
                with self._failing():
                    tell(tracker, event)

    def receive(self, event: Event) -> None:
        with self._failing():
            self._tell(event)

    def close(self) -> None:
        with self._failing():
            self._tracker.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever a tracker, its disk or its network raises is a `TrackerError`."""
        try:
            yield
        except Exception as error:
            reason = reason_of(error)
            raise TrackerError(f"{self._name}: {reason}; {_LEFT_OUT}") from error

    def _tell(self, event: Event) -> None:
        if isinstance(event, (Progress, Saved, Started, Tabulated, Traced)):
            return
        if isinstance(event, Drawn):
            self._tracker.figure(event.step, event.name, event.figure)
        elif isinstance(event, Finished):
            if event.message:
                self._tracker.text(event.step, "end", event.message)
            self._tracker.end(status(event.reason))
        else:
            told = plain(event)
            if _key(told) not in self._told:
                tell(self._tracker, told)
                if isinstance(event, Warned):
                    self._told.add(_key(told))


def _key(event: Mapping[str, Any]) -> tuple[str, Any]:
    """What an event is told once for: a kind of warning, the measures of a step."""
    return event["event"], event["kind"] if event["event"] == "warned" else event["step"]


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Whatever a tracker raises while it is opened is a `TrackerError`; errors of this package are as they are."""
    try:
        yield
    except BilevelError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise TrackerError(f"{name}: cannot be opened: {type(error).__name__}: {reason}") from error


_LEFT_OUT = "it is left out from here on, and the run goes on. events.jsonl has all"


def tell(tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Tell what an event of the record holds for charts."""
    if event["event"] == "warned":
        tracker.text(event["step"], f"warning/{event['kind']}", event["message"])
    elif values := scalars(event):
        tracker.scalars(event["step"], values)


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event of the record by their names in trackers; {} where it has none."""
    kind = event["event"]
    if kind in ("evaluated", "held"):
        where = "eval" if kind == "evaluated" else "control"
        return {f"{where}/{name}": record.number(v) for name, v in event["metrics"].items()}
    return dict(_statistics(event)) if kind == "stepped" else {}


def _statistics(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, path in _STEPPED.items():
        value: Any = event
        for key in path:
            value = value.get(key)  # a record of an older version may lack a statistic
        if value is not None:
            yield name, record.number(value)


def recorded(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """The events of the record up to the checkpoint at `step`, which a resumed run does not say again."""
    for event in record.read(folder):
        if event["step"] <= step and event["event"] not in ("held", "finished"):
            yield event


def status(reason: str) -> Status:
    """How a run ended, for a tracker: `Finished.reason` in three words."""
    return "done" if reason in COMPLETE else ("failed" if reason in _FAILED else "stopped")


_FAILED = ("diverged", "failed")


def settings(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run, nested; {} where the folder has none."""
    path = folder / RESOLVED
    if not path.is_file():
        return {}
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def flat(content: Any, where: str = "") -> dict[str, Any]:
    """Every value below its dotted key: {"upper.optimizer.lr": 0.1}."""
    if isinstance(content, Mapping):
        parts = content.items()
    elif isinstance(content, list):
        parts = enumerate(content)
    else:
        return {where: content}
    found: dict[str, Any] = {}
    for key, value in parts:
        found |= flat(value, f"{where}.{key}" if where else str(key))
    return found


def run_name(folder: Path) -> str:
    """How the run is called in a tracker: the name of its folder, 20261128-080214-1a2b3c."""
    return folder.resolve().name


def project_name(folder: Path) -> str:
    """What groups the run with its like: the name of the recipe, whose folder it lies in."""
    return str(settings(folder).get("name") or folder.resolve().parent.name or "bilevel")


def require(module: str, extra: str) -> None:
    """Raises `RequirementError` with the line that installs it where a tracker's package is missing."""
    if find_spec(module) is None:
        raise RequirementError(
            f"sink {extra} needs the package {module}: pip install 'bilevel[{extra}]'"
        )


def picture(figure: Any) -> Any:
    """A matplotlib figure as an array of pixels, (height, width, 4) of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
