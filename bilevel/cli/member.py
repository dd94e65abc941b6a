"""A process as one of the ranks of a run, or alone: how it joins, and what it leaves when it ends.

The first rank writes and speaks. Another one is silent, and ends with the code of the first, after it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.cli.boundary import Stopped, outcome
from bilevel.cli.options import settings
from bilevel.cli.signals import MARK, NUMBERS, Signals
from bilevel.errors import LostRankError
from bilevel.run.notices import PERIOD, Notices

if TYPE_CHECKING:
    from bilevel.ranks import Ranks
    from bilevel.run.options import Runtime

PATIENCE = 1.0
"""Seconds in which a rank that failed expects the first to fail for the same reason.

After them it ends, which wakes a first rank that waits for it.
"""
FAREWELL = 5.0
"""Seconds for which the first rank puts off its end, having failed, until the others have begun.

At its end a launcher ends them, and one that hears of it by then ends with the first rank's code.
"""


@dataclass
class Member:
    """One of the processes that the environment announces, or one alone."""

    notices: Notices | None = None
    signals: Signals = field(default_factory=Signals)
    heard: list[int] = field(default_factory=list)
    """Signals that came while `signals` was not entered, but from `begin` on."""
    timeout: float = 600.0
    """Seconds to wait for others before all are there; a recipe has a time of its own for sums."""

    @property
    def is_first(self) -> bool:
        return self.notices is None or self.notices.rank == 0

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Hear signals: within, as `signals` says; afterwards they are noted, until the process ends."""
        assert self.notices is not None
        _on_signals(lambda number, frame: self.heard.append(number))
        with self.signals:
            if self.heard:
                raise Stopped(128 + self.heard[0])
            self.notices.begin()
            yield

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What the first rank finds, in plain values, on every rank; before they are a group."""
        if self.notices is None:
            return work()
        if not self.is_first:
            return self.notices.told(self.timeout)
        found = work()
        self.notices.tell(found)
        return found

    def join(self, runtime: Runtime) -> Ranks:
        """The ranks of a run, once all of them can compute it; alone without others.

        Raises:
            LostRankError: another one cannot; it is told why.
        """
        from bilevel import ranks
        from bilevel.run import placement

        if self.notices is None:
            return ranks.ALONE
        local = int(os.environ.get("LOCAL_RANK", self.notices.rank))
        here = ranks.Ranks(self.notices.rank, self.notices.size, local)
        kind = placement.device(runtime.device, ranks=here).type
        self.notices.meet(self.timeout)
        return ranks.join(kind, runtime.timeout, self.notices)


def register(rank: int) -> None:
    """Have signals to the process that started this rank passed on to it; nothing under torchrun."""
    if folder := os.environ.get(MARK):
        with suppress(OSError):
            Path(folder, str(rank)).write_text(str(os.getpid()), encoding="ascii")


def leave_word(notices: Notices | None, error: BaseException) -> None:
    """Say in notices what ended this rank, once; nothing where it is alone."""
    if notices is not None:
        code, said = outcome(error)
        notices.leave(code, said, is_cause=not isinstance(error, LostRankError))


@contextmanager
def leaving_a_word(member: Member) -> Iterator[None]:
    """Whatever ends this rank is said in the notices; any but the first then ends without a message."""
    assert member.notices is not None
    try:
        yield
    except BaseException as error:
        leave_word(member.notices, error)
        if member.is_first or settings.debug:
            raise
        raise Stopped(outcome(error)[0]) from error


@contextmanager
def ending_together(is_first: bool, member: Member) -> Iterator[None]:
    """The first rank is the last to speak and the first to end, and all end with its code.

    So a launcher that stops the others once one has failed stops nobody who has something to say.
    """
    import typer

    code = 0
    with _heard(is_first):
        try:
            yield
        except typer.Exit as error:
            code = error.exit_code
        except BaseException:  # which Python shows, with its traceback
            _end(member, 1)
            raise
        code = _end(member, code)
    if code:
        raise typer.Exit(code)


def _end(member: Member, code: int) -> int:
    notices = member.notices
    if notices is None:
        return code
    if member.is_first:
        sys.stdout.flush()
        notices.end(code)
        if 0 < code <= 128:  # of a signal the others hear themselves
            _await_the_others(notices, member.heard)
    else:
        code = _code_of_the_first(notices, code, member.heard)
    with suppress(Exception):
        from bilevel import ranks

        ranks.depart()
    _on_signals(signal.SIG_IGN)  # a handler of Python's is gone before the process is
    return code


def _await_the_others(notices: Notices, heard: Sequence[int]) -> None:
    until = time.monotonic() + FAREWELL
    while not (heard or notices.have_begun() or time.monotonic() > until):
        time.sleep(PERIOD)


def _on_signals(handler: Any) -> None:
    for number in NUMBERS:
        signal.signal(number, handler)


def _code_of_the_first(notices: Notices, code: int, heard: Sequence[int]) -> int:
    """That with which the first rank ends, once it does.

    One's own where the first knows of no end, is gone, or a launcher says that it is over.
    """
    until = time.monotonic() + PATIENCE
    with suppress(LostRankError):
        while (ended := notices.ended()) is None:
            is_late = code and notices.word(0) is None and time.monotonic() > until
            if is_late or signal.SIGTERM in heard:
                return code or 128 + signal.SIGTERM
            time.sleep(PERIOD)
        return ended
    return code


@contextmanager
def _heard(is_first: bool) -> Iterator[None]:
    """Any rank but the first prints nothing: what each would say, the first does."""
    if is_first:
        yield
        return
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        sys.stderr = before[1] if settings.debug else nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
