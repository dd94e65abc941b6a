"""What `run` and `resume` share: the one loop that hands each event to every sink and saves the state."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bilevel import report
from bilevel.cli.boundary import Stopped, complain, requiring
from bilevel.cli.member import leave_word
from bilevel.cli.options import settings as given
from bilevel.cli.output import going_on
from bilevel.cli.shown import Measured, Showing
from bilevel.cli.signals import Signals, unheard
from bilevel.cli.user_code import explained, explaining
from bilevel.errors import (
    BilevelError,
    CheckError,
    CheckpointError,
    ConvergenceError,
    LostRankError,
    TrackerError,
    UserCodeError,
)
from bilevel.events import HELD, Evaluated, Event, Finished, Progress, Saved, Stepped, Warned
from bilevel.recipe.recipe import Recipe
from bilevel.recipe.settings import settings
from bilevel.run import engine
from bilevel.run.engine import Setup, State
from bilevel.runfolder import checkpoint, record
from bilevel.runfolder.folder import RunFolder
from bilevel.sinks import Receiver
from bilevel.sinks.console import ConsoleReceiver

LEFT_OUT = "interrupted: not measured, so what is owed to x is not known. The run itself is done"


@dataclass
class RunLoop:
    """A run in its folder: prepared, driven to the end or to a signal, saved, reported."""

    console: Console
    recipe: Recipe
    setup: Setup
    folder: RunFolder
    with_report: bool = True
    """False where the command line says so, whatever the recipe says."""
    shown: Showing = ConsoleReceiver
    """What a person, or a machine, sees of it."""
    signals: Signals = field(default_factory=Signals)
    receivers: list[Receiver] = field(default_factory=list)
    saved: Path | None = None
    settings: dict[str, str] = field(init=False)
    """Those of the recipe, with its files as they were when the run began."""
    is_resumed: bool = False
    is_delivered: bool = True
    """Whether every sink has what the engine said last."""
    is_finished: bool = False
    """Whether the record has its end."""
    is_done: bool = False
    """Whether that is the end of the run, after which there is nothing to resume."""
    is_reported: bool = False
    is_named: bool = False
    """Whether the folder was told."""
    broken: UserCodeError | None = None
    """What the first sink raised that is somebody's own: it has no more events, the others have."""

    def __post_init__(self) -> None:
        self.settings = settings(self.recipe.content)

    def begin(self) -> None:
        with self._without_console(), self.signals:
            try:
                with self._closing_on_error(), explaining(), self._requiring():
                    early = self._prepare()
                    state = engine.start(self.setup)
                    if self.setup.ranks.team is None:  # to make a state whole takes all ranks
                        checkpoint.require_savable(state.save())
            except BaseException as error:
                self._discard()
                _say_stopped(error)
                raise
            try:
                self._drive(state, early, None)
            except BaseException as error:
                if not isinstance(error, (Exception, SystemExit)):
                    raise
                # A divergence is a result, a full disk may pass, and so may what killed another rank;
                # after any other error before the first step is done there is nothing to resume
                # from, nor to read.
                cause = error.__cause__ if isinstance(error, UserCodeError) else error
                passing = (ConvergenceError, CheckpointError, OSError, LostRankError)
                lasting = not isinstance(cause, passing) or getattr(cause, "is_told", False)
                if lasting and state.step == 0 and self.saved is None:
                    self._discard()
                    _say_stopped(error)
                else:
                    self._name_folder()
                    self._report_on(error)
                raise

    def resume(self, found: checkpoint.FoundCheckpoint | None) -> None:
        self.is_resumed = True
        with self._without_console(), self.signals:
            measured = self._measured(found.step if found else 0)
            self._name_folder()
            with self._closing_on_error(), explaining(), self._requiring():
                early = self._prepare(measured)
                if found is None:
                    state, step = engine.start(self.setup), None
                else:
                    state = engine.restore(self.setup, checkpoint.load(found.path))
                    step, self.saved = found.step, found.path
            try:
                self._drive(state, early, step)
            except (Exception, SystemExit) as error:
                self._report_on(error)
                raise

    def _prepare(self, measured: Measured = ()) -> list[Event]:
        shown = self.shown(self.console, measured)
        self.signals.tell = shown.stopping
        self.receivers.append(shown)
        for sink in self.recipe.sinks:
            if require := getattr(sink, "require", None):
                require()
        early = []
        for event in engine.prepare(self.setup):
            shown.receive(event)
            early.append(event)
        return early

    def _drive(self, state: State, early: Iterable[Event], step: int | None) -> None:
        """Run to the end or to a signal. What was prepared is recorded once the record is open."""
        try:
            with self._closing_on_error():
                shown = len(self.receivers)
                self._open_sinks(step)
                for event in early:
                    for receiver in self.receivers[shown:]:
                        self._tell(receiver, event)
                self.signals.is_patient = True
                self._loop(state)
            self._close()
            if self.is_done:
                self.signals.is_patient = False
                if self.signals.received:
                    raise Stopped(self.signals.code)
            self._report()
        except Stopped as stopped:
            said = f"stopped at once. {self._how_to_resume()}"
            raise Stopped(stopped.code, self._how_to_report() if self.is_done else said) from None
        if self.signals.received:
            raise Stopped(self.signals.code, self._how_to_resume())

    def _open_sinks(self, step: int | None) -> None:
        """A tracker that cannot be opened ends a new run, but keeps none from being resumed."""
        for sink in self.recipe.sinks:
            try:
                with explaining():
                    opened = sink.open(self.folder.path, step)
                    _require_receiver(opened, f"{type(sink).__name__}.open")
                self.receivers.append(opened)
                if caution := getattr(opened, "caution", ""):
                    complain(caution, kind="warning: ")
            except TrackerError as error:
                if not self.is_resumed:
                    raise TrackerError(f"{error}; mend it, or take it out of `sinks`") from error
                complain(f"{error}; the run goes on without it", kind="warning: ")

    def _loop(self, state: State) -> None:
        """Every end is an event: that of an error is told with its reason, then raised."""
        began = time.perf_counter()
        try:
            with explaining(lambda: f" in step {state.step + 1}"):
                self._take_steps(state, began)
        except (Exception, SystemExit) as error:
            leave_word(self.setup.ranks.notices, error)
            self._rescue(state)
            reason = "diverged" if isinstance(error, ConvergenceError) else "failed"
            said = str(error) or type(error).__name__
            spent = time.perf_counter() - began
            # what a full disk takes no more is not what ended the run
            with suppress(Exception):
                if not self.is_finished:
                    self._deliver(Finished(state.step, reason, spent, dict(state.warned), said))
            is_whole = self.is_finished and not self.signals.received
            if (state.step or self.saved) and not is_whole:
                if isinstance(error, UserCodeError):
                    raise UserCodeError(f"{error}\n{self._how_to_resume()}") from error
                if isinstance(error, LostRankError):
                    error.args = (f"{error}\n{self._how_to_resume()}",)
            raise

    def _take_steps(self, state: State, began: float) -> None:
        for event in engine.run(self.setup, state):
            self.is_delivered = False
            self._deliver(event)
            self.is_delivered = True
            if isinstance(event, Finished):
                self.signals.received, self.signals.tell = None, None
                self.is_finished = self.is_done = True
            elif isinstance(event, Progress) and event.stage == HELD:
                if self.signals.agree(self.setup.ranks):
                    self._deliver(Warned(state.step, HELD, LEFT_OUT))
                    self._end(state, began, *engine.ending(self.setup, state))
                    self.signals.received, self.signals.tell = None, None
                    self.is_done = True
                    return
            elif is_settled(event, self.setup, state):
                if isinstance(event, Evaluated) and engine.is_best(state):
                    self._save_best(state)
                is_last = engine.is_over(self.setup, state)
                every = self.recipe.checkpoint.every
                is_due = every and state.step and state.step % every == 0
                is_saved = is_last or is_due or (self.broken and self._is_ahead(state))
                if is_saved:
                    self._save(state)
                self._collect()
                if not is_last and self.signals.agree(self.setup.ranks):
                    if not is_saved:
                        self._save(state)
                    self._collect()
                    self._end(state, began, self.signals.reason)
                    return
            if self.broken and not self._is_ahead(state):
                raise self.broken

    def _is_ahead(self, state: State) -> bool:
        """Whether steps were taken that no checkpoint has."""
        return state.step > (checkpoint.step_of(self.saved) if self.saved else 0)

    def _end(self, state: State, began: float, reason: str, why: str = "") -> None:
        spent = time.perf_counter() - began
        self._deliver(Finished(state.step, reason, spent, dict(state.warned), why))
        self.is_finished = True
        if self.broken:
            raise self.broken

    def _rescue(self, state: State) -> None:
        """Save the last good step after an error of the engine or the problem.

        Not after one of a sink: its record would lack what the checkpoint has. Nor where ranks hold the
        state together, of which another may be gone: the last checkpoint stays.
        """
        is_in_parts = self.setup.ranks.team is not None
        if is_in_parts or not self.is_delivered or not self._is_ahead(state):
            return
        state.rewind()
        # what ended the run is told, not that its state could not be saved
        with suppress(Exception):
            self._save(state)

    def _save(self, state: State) -> None:
        keep = self.recipe.checkpoint.keep
        self.saved = checkpoint.save(
            self.folder.checkpoints,
            self._collect(state),
            step=state.step,
            keep=keep,
            settings=self.settings,
        )
        self._deliver(Saved(state.step, self.saved))

    def _save_best(self, state: State) -> None:
        """In a folder of its own, so that the newest that are kept do not push it out."""
        path = checkpoint.save(
            self.folder.best,
            self._collect(state),
            step=state.step,
            keep=1,
            settings=self.settings,
        )
        self._deliver(Saved(state.step, path))

    def _collect(self, state: State | None = None) -> Any:
        """What is to be saved of a state; of ranks that hold it together the others take part.

        They wait at each event after which it may be saved, until they are told, without a state, that
        there is no more (`bilevel.cli.follow.take_part`).
        """
        if self.setup.ranks.team is not None:
            self.setup.ranks.from_first(state is not None)
        return state.save() if state else None

    def _name_folder(self) -> None:
        """Said once, when there is what stays in it: what fails before leaves no folder."""
        if not self.is_named:
            self.is_named = True
            self.console.print(Text(f"{self.folder.path}/", style="dim"), soft_wrap=True)

    def _deliver(self, event: Event) -> None:
        if isinstance(event, (Stepped, Saved)):
            self._name_folder()
        for receiver in tuple(self.receivers):
            self._tell(receiver, event)

    def _tell(self, receiver: Receiver, event: Event) -> None:
        try:
            receiver.receive(event)
        except TrackerError as error:
            self._leave_out(receiver, event, str(error))
        except (Exception, SystemExit) as error:
            if not self._breaks(receiver, event, error):
                raise

    def _breaks(self, receiver: Receiver, event: Event, error: BaseException) -> bool:
        """Whether a sink that raised is somebody's own: it ends the run once the others have the step."""
        step = "" if isinstance(event, Progress) else f" of step {event.step}"
        where = f" at event {type(event).__name__.lower()}{step}"
        if isinstance(error, BilevelError) or given.debug:
            return False
        if (said := explained(error, lambda: where)) is None:
            return False
        self.receivers.remove(receiver)
        with suppress(Exception, SystemExit):
            receiver.close()
        if self.broken is None:
            self.broken = UserCodeError(said)
            self.broken.__cause__ = error
        return True

    def _leave_out(self, receiver: Receiver, event: Event, reason: str) -> None:
        """Go on without a tracker, which has a copy only of what the record has."""
        self.receivers.remove(receiver)
        with suppress(Exception):
            receiver.close()
        if isinstance(
            event, (Finished, Progress)
        ):  # the one ends the record, the other has no step
            complain(reason, kind="warning: ")
        else:
            self._deliver(Warned(event.step, reason.partition(":")[0], reason))

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # A disk that took no event takes no last one either: the first failure is the one told.
            with suppress(Exception):
                self._close()
            raise

    def _close(self) -> None:
        """Close each receiver, also where the one before it could not be."""
        with ExitStack() as closing:
            for receiver in self.receivers:
                closing.callback(_close, receiver)

    def _discard(self) -> None:
        with unheard():
            shutil.rmtree(self.folder.path, ignore_errors=True)

    def _without_console(self) -> AbstractContextManager[None]:
        return going_on(f"the run in {self.folder.path}")

    def _requiring(self) -> AbstractContextManager[None]:
        return requiring(f"problem {type(self.setup.problem).__name__}")

    def _measured(self, step: int) -> list[Evaluated]:
        """What the record has up to a step. It is read whole, so that damage is told before slow work."""
        events = list(record.read(self.folder.path))
        return [
            Evaluated(each["step"], {k: record.number(v) for k, v in each["metrics"].items()})
            for each in events
            if each["event"] == "evaluated" and each["step"] <= step
        ]

    def _how_to_resume(self) -> str:
        where = f"from {self.saved.name}" if self.saved else "from the start: nothing is saved yet"
        ranks = self.setup.ranks
        with_ranks = "" if ranks.is_alone else f" --ranks {ranks.size}"
        return f"Go on ({where}): bilevel resume {self.folder.path}{with_ranks}"

    def _how_to_report(self) -> str:
        said = f"the run in {self.folder.path} is done"
        if self.is_reported or not self._is_report_asked():
            return said
        return f"{said}. Write its report: bilevel report {self.folder.path}"

    def _is_report_asked(self) -> bool:
        return self.with_report and self.recipe.report and not report.missing()

    def _report_on(self, error: BaseException) -> None:
        """The report of a run that an error ended; a disk that took no event takes no report."""
        if not isinstance(error, (CheckpointError, OSError)):
            self._report()

    def _report(self) -> None:
        if not self._is_report_asked():
            return
        try:
            path = report.write(self.folder)
            self.is_reported = True
        except (BilevelError, OSError) as error:
            complain(f"no report: {error}", kind="warning: ")
        else:
            self.console.print(Text(f"{path}"), soft_wrap=True)


def is_settled(event: Event, setup: Setup, state: State) -> bool:
    """Whether all events of the present step have come, so that none is lost or repeated."""
    if isinstance(event, Evaluated):
        return True
    return isinstance(event, Stepped) and not engine.is_due(setup, state)


def _require_receiver(opened: object, method: str) -> None:
    if not isinstance(opened, Receiver):
        raise CheckError(
            f"{method} must return what has receive(event) and close(); got a {type(opened).__name__}"
        )


def _say_stopped(error: BaseException) -> None:
    """Raise `Stopped` where a signal ended a run of which nothing is left, also one to another rank."""
    code = error.code if isinstance(error, Stopped) else 0
    if isinstance(error, LostRankError) and error.is_told and error.exit_code > 128:
        code = error.exit_code
    if code:
        raise Stopped(code, "stopped before the first step: no run") from None


def _close(receiver: Receiver) -> None:
    try:
        with explaining(lambda: " at the end of the run"):
            receiver.close()
    except TrackerError as error:
        complain(str(error), kind="warning: ")
