"""Measure this library beside its peers: `make benchmark`, or python -m tests.benchmarks.run.

Every method has a process of its own, with one thread. Seconds are the processor's, so that a
busy machine is not counted; the methods take turns, so that a slow minute hits all of them; a
ratio is the median over the rounds of the ratio within a round. Memory is the growth of resident
memory over one call in a fresh process. Errors are against the formula typed out, in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from tests.benchmarks.environments import PEERS, ROOT, python_of
from tests.benchmarks.peers import by_hand
from tests.benchmarks.table import Row, table, write
from tests.benchmarks.tasks import TASKS, kind

AGAINST = {"cg": "floor", "neumann": "floor", "unroll": "autograd, all graphs kept"}
ROWS = {
    "cg": ["floor", "bilevel", "torchopt", "boat-torch", "betty-ml"],
    "neumann": ["floor", "bilevel", "torchopt", "boat-torch", "betty-ml"],
    "unroll": [
        "autograd, all graphs kept",
        "bilevel, store",
        "bilevel, recompute",
        "bilevel, traced",
        "bilevel, mixed",
        "bilevel, checkpoint",
        "higher",
        "torchopt",
        "boat-torch",
    ],
    "unroll, momentum": [
        "autograd, all graphs kept",
        "bilevel, store",
        "bilevel, recompute",
        "bilevel, traced",
        "bilevel, mixed",
        "bilevel, checkpoint",
        "bilevel, reversible",
    ],
}


def rows_of(task: str) -> list[str]:
    """What a task is measured with: its own rows, or those of its kind."""
    return ROWS.get(task) or ROWS[kind(task)]


class Worker:
    """A process that answers."""

    def __init__(self, command: list[str]) -> None:
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, word: str):
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args}: died, its traceback stands above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def worker(row: str, task: str, size: str, cache: Path) -> Iterator[Worker]:
    """A process in the environment that the row needs."""
    if row in PEERS:
        python, module = python_of(row, cache), PEERS[row].module
    else:
        python, module = sys.executable, "ours" if row.startswith("bilevel") else "by_hand"
    found = Worker([str(python), "-m", "tests.benchmarks.worker", module, row, task, size])
    try:
        yield found
    finally:
        found.close()


def measure(task: str, names: list[str], size: str, rounds: int, cache: Path) -> list[Row]:
    """Every row on one task."""
    made = TASKS[task](toy=size == "toy")
    truth = by_hand.TRUTH[kind(task)](made.to(torch.float64))
    expected = torch.cat([part.flatten() for part in truth.values()])
    memory, errors = {}, {}
    for name in names:
        with worker(name, task, size, cache) as one:
            memory[name] = one.ask("memory")
            got = torch.tensor(one.ask("value"), dtype=torch.float64).flatten()
            error = float((got - expected).norm() / expected.norm())
            errors[name] = None if name == "floor" else error
    seconds = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {n: stack.enter_context(worker(n, task, size, cache)) for n in names}
        for _ in range(rounds):
            for name, one in workers.items():
                seconds[name].append(one.ask("time"))
    return [Row(name, seconds[name], memory[name], errors[name]) for name in names]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--size", default="full", choices=["full", "toy"])
    options.add_argument("--cache", type=Path, default=ROOT / ".benchmark")
    options.add_argument("--page", type=Path, help="a page with markers to write the tables into")
    given = options.parse_args()
    torch.set_num_threads(1)
    for task in given.tasks:
        rows = measure(task, rows_of(task), given.size, given.rounds, given.cache)
        text = table(rows, AGAINST[kind(task)])
        print(f"{task}, {given.rounds} rounds, torch {torch.__version__}\n{text}\n", flush=True)
        if given.page:
            write(given.page, task, text)


if __name__ == "__main__":
    main()
