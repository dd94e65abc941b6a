"""Ctrl-C, SIGTERM and SIGHUP during a run: the step is finished and saved; the second time, at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from bilevel.cli.boundary import Stopped

REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
HANGUP = getattr(signal, "SIGHUP", None)  # which Windows does not have


class Signals:
    """Notes a signal while it is entered; `received` is looked at between steps.

    While `is_patient` is false, as before the first step, a signal raises `Stopped` at once. A hang-up
    never does so as the second one: a terminal that closes sends it twice, and systemd after SIGTERM.
    One that is ignored, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_patient = False
        self.tell: Callable[[], None] | None = None
        """Called when a signal is noted."""
        self._asked = ""
        self._before: dict[signal.Signals, object] = {}

    @property
    def code(self) -> int:
        """The exit code for the signal received."""
        assert self.received is not None
        return 128 + self.received

    @property
    def reason(self) -> str:
        """How `Finished` calls the signal received, or what was asked."""
        assert self.received is not None
        return self._asked or REASONS[self.received.name]

    def ask(self, reason: str) -> None:
        """Have the run end after this step, its state saved, as SIGTERM would, for another reason."""
        self.received, self._asked = signal.SIGTERM, reason

    def __enter__(self) -> Signals:
        for number in (signal.Signals[name] for name in REASONS if hasattr(signal, name)):
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if again and number == HANGUP:
            return
        self.received = signal.Signals(number)
        if again or not self.is_patient:
            raise Stopped(self.code)
        if self.tell:
            self.tell()
