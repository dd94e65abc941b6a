"""Several ranks in tests: processes forked from the test, that sum by gloo."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# which torch.autograd.grad imports when it is first given vectors: once, and not in every process
import torch.fx.experimental.symbolic_shapes
from torch import distributed
from torch.multiprocessing import ProcessExitedException, start_processes

from bilevel import ranks as over
from bilevel.ranks import Ranks


def on_ranks(
    size: int,
    work: Callable[[Ranks], Any],
    timeout: float = 60.0,
    *,
    start: str = "fork",
    backend: str = "gloo",
) -> list[Any]:
    """What `work` returns on each of so many ranks; an `Exception` that it raises in its place.

    It is called in a process forked from this one, and so may be any function, of any fixture; one that
    is spawned, as a GPU needs, takes functions of modules.
    """
    try:
        return _on_ranks(size, work, timeout, start, backend)
    except ProcessExitedException as error:
        if error.signal_name != "SIGSEGV":
            raise
        print(CRASHED, file=sys.__stderr__, flush=True)
        return _on_ranks(size, work, timeout, start, backend)


CRASHED = "a rank ended by SIGSEGV, outside of Python; the ranks of this test are begun once more"
"""Seen twice in some fifty runs of tests/problem/test_over_ranks.py, within a sum by gloo and in none of
Python's threads; what it comes from is not known."""


def _on_ranks(
    size: int, work: Callable[[Ranks], Any], timeout: float, start: str, backend: str
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # of Python 3.12 on, where the process that forks has threads: torch's own are idle in tests
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        start_processes(_one, (size, work, folder, timeout, backend), size, start_method=start)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(size)]


def _one(
    rank: int, size: int, work: Callable[[Ranks], Any], folder: str, timeout: float, backend: str
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    distributed.init_process_group(
        backend,
        store=distributed.FileStore(str(Path(folder, "store")), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    assert distributed.group.WORLD is not None
    ranks = over.adopt(distributed.group.WORLD)
    try:
        found: Any = work(ranks)
    except Exception as error:
        error.add_note(traceback.format_exc())
        found = error
    torch.save(found, Path(folder, f"{rank}.pt"))
    over.depart()
