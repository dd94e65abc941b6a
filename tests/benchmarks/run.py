"""Measure this library beside its peers: `make benchmark`, or python -m tests.benchmarks.run.

Every method has a process of its own, with one thread. Seconds are the processor's, so that a
busy machine is not counted; the methods take turns, so that a slow minute hits all of them; a
ratio is the median over the rounds of the ratio within a round. Memory is the growth of resident
memory over one call in a fresh process. Errors are against the formula typed out, in float64.

A row is kept as soon as it is measured, in docs/benchmarks/. A row that has been measured at this
commit on this machine is not measured again unless told so, so that the command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from tests.benchmarks import measured, startup
from tests.benchmarks.environments import PEERS, ROOT, python_of
from tests.benchmarks.hold import CannotHold
from tests.benchmarks.measured import KEPT, Measured, Method
from tests.benchmarks.peers import by_hand
from tests.benchmarks.rows import ROWS, Row, is_by_hand
from tests.benchmarks.table import table
from tests.benchmarks.tasks import kind
from tests.benchmarks.whole import TASKS


class Worker:
    """A process that answers."""

    def __init__(self, command: list[str]) -> None:
        settings = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
            "JAX_PLATFORMS": "cpu",
        }
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
        with suppress(BrokenPipeError):  # of one that has ended by what it says below
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args}: died, its traceback stands above")
        found = json.loads(answer)
        if isinstance(found, dict):
            raise CannotHold(found["cannot"])
        return found

    def close(self) -> None:
        self._process.communicate()


def home(method: str, cache: Path) -> tuple[Path | str, str]:
    """(interpreter, module of `peers/`) of a method."""
    if is_by_hand(method) or method.startswith("bilevel"):
        return sys.executable, "by_hand" if is_by_hand(method) else "ours"
    library = method.split(",")[0]
    library = "jax" if library in ("JAX", "jaxopt") else library
    return python_of(library, cache), PEERS[library].module


@contextmanager
def worker(method: str, row: str, size: str, cache: Path) -> Iterator[Worker]:
    """A process in the environment that the method needs."""
    python, module = home(method, cache)
    found = Worker([str(python), "-m", "tests.benchmarks.worker", module, method, row, size])
    try:
        yield found
    finally:
        found.close()


def measure(name: str, row: Row, size: str, rounds: int, cache: Path) -> Measured:
    """Every method on one task: its memory and value first, then the rounds in turn."""
    truth = by_hand.TRUTH[kind(name)](TASKS[name](toy=size == "toy").to(torch.float64))
    expected = torch.cat([part.flatten() for _, part in sorted(truth.items())])
    methods: list[Method] = []
    absent = dict(row.absent)
    with ExitStack() as stack:
        workers = {m: stack.enter_context(worker(m, name, size, cache)) for m in row.methods}
        for method, one in workers.items():
            try:
                memory = one.ask("memory")
            except CannotHold as error:
                absent[method] = str(error)
                continue
            parts = [torch.tensor(part, dtype=torch.float64) for part in one.ask("value")]
            got = torch.cat([part.flatten() for part in parts])
            error = float((got - expected).norm() / expected.norm())
            methods.append(Method(method, [], memory, None if method == "floor" else error))
        for _ in range(rounds):
            for method in methods:
                method.seconds.append(workers[method.name].ask("time"))
    return Measured(name, row.floor, methods, absent, row.per, row.unit)


Measure = Callable[[str], Measured]


def go(names: list[str], how: Measure, kept: Path, *, again: bool = False) -> list[str]:
    """Measure the rows that have not been at this commit on this machine, keeping each; their names."""
    done = []
    for name in names:
        now = {"commit": measured.commit(), "machine": measured.machine()}
        before = measured.load(name, kept)
        if before and not again and {k: getattr(before, k) for k in now} == now:
            print(f"{name}: measured at {before.commit} before", flush=True)
            continue
        found = how(name)
        found = replace(found, date=measured.today(), **now)
        measured.save(found, kept)
        measured.append(found, kept)
        print(f"{name}\n{table(found)}\n", flush=True)
        done.append(name)
    return done


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options.add_argument("--rounds", type=int, help="of each row, in the place of its own number")
    options.add_argument("--size", default="full", choices=["full", "toy"])
    options.add_argument("--again", action="store_true", help="measure what is measured already")
    options.add_argument("--cache", type=Path, default=ROOT / ".benchmark")
    options.add_argument("--kept", type=Path, default=KEPT, help="where results are kept")
    given = options.parse_args()
    torch.set_num_threads(1)

    def how(name: str) -> Measured:
        row = ROWS[name]
        if row.unit == "start-up":
            return startup.measure(name, given.rounds or row.rounds, given.cache)
        return measure(name, row, given.size, given.rounds or row.rounds, given.cache)

    go(given.rows, how, given.kept, again=given.again)


if __name__ == "__main__":
    main()
