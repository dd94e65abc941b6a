"""Ctrl-C and SIGTERM during a run: the step is finished and saved; the second time, at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from bilevel.cli.boundary import Stopped

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signals:
    """Notes a signal while it is entered; `received` is looked at between steps.

    While `is_patient` is false, as before the first step, a signal raises `Stopped` at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_patient = False
        self.tell: Callable[[], None] | None = None
        """Called when a signal is noted."""
        self._before: dict[signal.Signals, object] = {}

    @property
    def code(self) -> int:
        """The exit code for the signal received."""
        assert self.received is not None
        return CODES[self.received]

    @property
    def reason(self) -> str:
        """How `Finished` calls the signal received."""
        assert self.received is not None
        return REASONS[self.received]

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in CODES}
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
        self.received = signal.Signals(number)
        if again or not self.is_patient:
            raise Stopped(self.code)
        if self.tell:
            self.tell()
