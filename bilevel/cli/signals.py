"""Ctrl-C, SIGTERM and SIGHUP during a run: the step is finished and saved; the second time, at once.

What one of several ranks receives, all act upon, after the same step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from bilevel.cli.boundary import Stopped

if TYPE_CHECKING:
    from bilevel.ranks import Ranks

MARK = "BILEVEL_LAUNCH"
"""Where ranks that `--ranks` has started write their process ids."""
REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
NUMBERS = [signal.Signals[name] for name in REASONS if hasattr(signal, name)]
HANGUP = getattr(signal, "SIGHUP", None)  # which Windows does not have


@contextmanager
def unheard() -> Iterator[None]:
    """Within, no signal of `NUMBERS` interrupts what would be left half done, as a folder half removed."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Notes a signal while it is entered; `received` is looked at between steps.

    While `is_patient` is false, as before the first step, a signal raises `Stopped` at once. A hang-up
    never does so as the second one: a terminal that closes sends it twice, and systemd after SIGTERM.
    Nor does any under torchrun: a scheduler signals all processes of a job, torchrun passes on to its
    ranks what they have had already, and kills what does not end. One that is ignored, as under nohup,
    stays so. It may be entered within itself.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_patient = False
        self.tell: Callable[[], None] | None = None
        """Called when a signal is noted."""
        self._asked = ""
        self._before: dict[signal.Signals, object] = {}
        self._depth = 0
        # of a launcher that is gone no signal comes any more
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._is_told_twice = self._launcher is not None and MARK not in os.environ

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

    def agree(self, ranks: Ranks) -> bool:
        """Whether to end after this step, as any of the ranks was told to; all ask after the same one."""
        own = self.received
        if own is None and self._launcher not in (None, os.getppid()):
            own = HANGUP
        number = ranks.most(int(own or 0))
        if number:
            self.received = signal.Signals(number)
        return bool(number)

    def __enter__(self) -> Signals:
        self._depth += 1
        if self._depth > 1:
            return self
        for number in NUMBERS:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if again and (number == HANGUP or self._is_told_twice):
            return
        self.received = signal.Signals(number)
        if again or not self.is_patient:
            raise Stopped(self.code)
        # by SIGTERM a launcher ends the ranks that are left, once one has failed
        if self.tell and (self._launcher is None or number != signal.SIGTERM):
            self.tell()
