"""One method on one task in a process of its own: a word on standard input, an answer in JSON.

`value` the hypergradient, `time` the processor seconds of one call, `memory` the peak of one call.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from bilevel.comparing.memory import peak
from tests.benchmarks.tasks import TASKS, Params, Task, kind

Method = Callable[[Task], Params]


def main(module: str, row: str, name: str, size: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what a peer's code is warned of is no concern of ours
    method = importlib.import_module(f"tests.benchmarks.peers.{module}").METHODS[row][kind(name)]
    method(TASKS[name](toy=True))  # what is loaded at the first call is neither time nor memory
    task = TASKS[name](toy=size == "toy")
    for line in sys.stdin:
        gc.collect()
        print(json.dumps(answer(line.strip(), method, task)), flush=True)


def answer(word: str, method: Method, task: Task) -> float | list[Any]:
    """What one call of the method gives, or costs."""
    if word == "value":
        return [part.tolist() for part in method(task).values()]
    if word == "memory":
        with peak(torch.device("cpu")) as found:
            method(task)
        return found.bytes
    if word == "time":
        began = time.process_time()
        method(task)
        return time.process_time() - began
    raise ValueError(f"{word!r}: expected value, time or memory")


if __name__ == "__main__":
    main(*sys.argv[1:])
