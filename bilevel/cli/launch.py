"""`--ranks N`: N processes of this machine that compute one run, started and watched by torch's own agent.

Each is the same command line without `--ranks`, as torchrun would start it. The agent knows how each
ended; what is added to it is that a signal goes to the ranks, and that they have all the time they need.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bilevel.cli.options import settings
from bilevel.cli.signals import MARK, NUMBERS
from bilevel.errors import RankError

LAST = 10
"""Seconds from the second signal to the end of what has not ended."""
SOON = 0.01
"""Seconds until a signal is sent again of which the exception was lost."""


def launch(size: int, words: Sequence[str]) -> tuple[int, str]:
    """(exit code, what is to be said beside what the ranks said), once all have ended."""
    with tempfile.TemporaryDirectory(prefix="bilevel-") as folder, quiet():
        relay = Relay(Path(folder), size)
        with _environment(size, folder), relay:
            try:
                elastic_launch(config(size), sys.executable)(*_command(words))
            except ChildFailedError as error:
                code, said = verdict(size, error.failures)
                return code, "" if relay.received else said
            except SignalException:
                assert relay.received is not None
                return 128 + relay.received, ""
            except (RuntimeError, OSError) as error:
                raise RankError(f"{size} ranks cannot be started here: {error}") from error
    return 0, ""


def verdict(size: int, failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """(exit code, what is to be said where no rank did): of the rank that ended the others.

    Failures come as they were seen. One that was killed may be seen after one that lost it.
    """
    found = list(failures.items())
    first = found[0]
    if first[1].exitcode == RankError.exit_code:
        at_once = [one for one in found if one[1].timestamp <= first[1].timestamp + 1]
        killed = [one for one in at_once if one[1].exitcode < 0]
        first = next((one for one in killed if one[1].exitcode != -signal.SIGTERM), first)
    rank, failure = first
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    spoke = 0 not in failures or failures[0].exitcode > 0
    if spoke:
        return code, ""
    how = f"ended with exit code {code}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        how += ", as the system does where memory runs out" if code == 137 else ""
    return code, (
        f"rank {rank} of {size} {how}. `bilevel runs` lists the run, and `bilevel resume RUN --ranks "
        f"{size}` goes on with it from what was saved"
    )


@dataclass
class Relay:
    """Passes a signal on to the ranks, which have a session of their own; ends them at the second."""

    folder: Path
    size: int
    received: signal.Signals | None = None
    _before: dict[int, Any] = field(default_factory=dict)
    _hook: Any = None
    _earlier: signal.Signals | None = None
    """What had been received before the last signal."""

    def __enter__(self) -> Relay:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._note_lost
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._pass)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _note_lost(self, what: Any) -> None:
        """What a handler raises while an object is finalized goes nowhere: so the signal is sent again."""
        if not isinstance(what.exc_value, SignalException) or self.received is None:
            self._hook(what)
            return
        number, self.received = self.received, self._earlier
        threading.Timer(SOON, os.kill, (os.getpid(), number)).start()

    def _pass(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received, signal.Signals(number)
        self._earlier = again
        ranks = [path.read_text(encoding="ascii") for path in self.folder.iterdir()]
        if len(ranks) < self.size:  # not all of them hear a signal yet
            raise SignalException("before the ranks had begun", signal.SIGTERM)
        if again is not None:
            if self.received.name == "SIGHUP":  # which comes twice, and after SIGTERM
                self.received = again
                return
            raise SignalException("the second signal", self.received)
        for pid in filter(None, ranks):
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)


def _command(words: Sequence[str]) -> list[str]:
    """This command line for one rank: by this interpreter, with modules from where this process has them."""
    left, given = [], iter(words)
    for word in given:
        if word == "--ranks":
            next(given, None)
        elif not word.startswith("--ranks="):
            left.append(word)
    safe = [] if {"", os.getcwd()} & {*sys.path} else ["-P"]
    return [*safe, "-m", "bilevel", *left]


def config(size: int, *, start: str = "spawn", words: str = os.devnull) -> LaunchConfig:
    """Of so many ranks on this machine, for torch's agent; `words` is where functions leave what they raise."""
    made = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id="bilevel",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # the others are passed on
        logs_specs=DefaultLogsSpecs(log_dir=words),
        start_method=start,
    )
    if hasattr(made, "shutdown_timeout"):  # from torch 2.13 on; before, it is 30
        made.shutdown_timeout = LAST
    return made


@contextmanager
def _environment(size: int, folder: str) -> Iterator[None]:
    """The mark, and as many threads for each rank as there are cores for it.

    What torch warns of from C++, as of connections to a process that was killed, only with `--debug`.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, _cores() // size))}
    if not settings.debug:
        wanted["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    added = {MARK: folder} | {k: v for k, v in wanted.items() if k not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def quiet() -> Iterator[None]:
    """What the agent logs of ranks that end is said in fewer words, unless tracebacks are asked for."""
    before = logging.root.manager.disable
    logging.disable(before if settings.debug else logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
