"""Processes that are forked from a warm server, and what became of one that died.

On Linux the server has imported torch and nothing else of weight: no thread runs in it and no tensor lives in
it, so that a process that is forked from it is as good as one of its own, without the seconds of its start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

SECONDS = ("torch.fx.experimental.symbolic_shapes",)
"""What torch imports at a first product, which takes half a second; nothing where it is not there."""


def context(*preload: str) -> Any:
    """How processes are started: forked where forking is safe from a server that has imported these modules."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*preload, *SECONDS])
    return found


def detach(said: str) -> None:
    """Within a process: nothing reaches its terminal but the file `said`, and no signal of it the process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the command alone, which then ends this process
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)


def death(code: int, said: Path) -> str:
    """Why a process with this exit code left no result: its signal, or the last it said."""
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}" + (
            " (out of memory?)" if -code == signal.SIGKILL else ""
        )
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((f": {line}" for line in reversed(lines) if line.strip()), "")
    return f"the process ended with code {code} and no result{last}"
