"""One method on one task in a process of its own: a word on standard input, an answer in JSON.

`value` what it computes, `time` the processor seconds of one call, `memory` the peak of one call.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bilevel.comparing.memory import peak
from tests.benchmarks.hold import CannotHold
from tests.benchmarks.tasks import kind
from tests.benchmarks.whole import TASKS

LEAST = 0.2
"""Processor seconds of a round: a call that takes less is repeated, by as much as its first took."""


class Timed:
    """A method on a task: what is done once is done when it is first needed, and not timed."""

    def __init__(self, method: Any, task: Any) -> None:
        self._method, self._task = method, task
        self._calls = 0
        self._call: Callable[[], Any] | None = None

    def value(self) -> list[Any]:
        """By the names of the variables, in their order."""
        return [part.tolist() for _, part in sorted(self._method(self._task).items())]

    def memory(self) -> int:
        call = self._ready()
        with peak(torch.device("cpu")) as found:
            spent = _seconds(call, 1)
        self._calls = max(1, round(LEAST / max(spent, 1e-6)))
        return found.bytes

    def time(self) -> float:
        call = self._ready()
        if count := getattr(call, "products", None):
            return count()  # what is counted and not timed
        if not self._calls:
            self._calls = max(1, round(LEAST / max(_seconds(call, 1), 1e-6)))
        return _seconds(call, self._calls)

    def _ready(self) -> Callable[[], Any]:
        if self._call is not None:
            return self._call
        ready = getattr(self._method, "ready", None)
        call = ready(self._task) if ready else partial(self._method, self._task)
        self._call = call
        return call


def _seconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call; what has to begin `again` for each does so untimed."""
    again, spent = getattr(call, "again", None), 0.0
    for _ in range(calls):
        if again:
            again()
        began = time.process_time()
        call()
        spent += time.process_time() - began
    return spent / calls


WORDS = {"value": Timed.value, "memory": Timed.memory, "time": Timed.time}


def answer(word: str, timed: Timed) -> Any:
    """What one call of the method gives, or costs."""
    if word not in WORDS:
        raise ValueError(f"{word!r}: expected one of {', '.join(WORDS)}")
    return WORDS[word](timed)


def main(module: str, row: str, name: str, size: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what a peer's code is warned of is no concern of ours
    try:
        serve(module, row, name, size)
    except CannotHold as error:
        print(json.dumps({"cannot": str(error)}), flush=True)


def serve(module: str, row: str, name: str, size: str) -> None:
    method = importlib.import_module(f"tests.benchmarks.peers.{module}").METHODS[row][kind(name)]
    method(TASKS[name](toy=True))  # what is loaded at the first call is neither time nor memory
    timed = Timed(method, TASKS[name](toy=size == "toy"))
    for line in sys.stdin:
        gc.collect()
        print(json.dumps(answer(line.strip(), timed)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
