"""Mutants of the sources, and the tests that kill them: `python -m tests.mutation.run [file …]`.

Takes the files of `table.EVIDENCE`, makes one change at a time, and runs the tests that the table
names until the first that fails. Not part of the suite: it takes an hour. Prints the table in
docs/checking.md, and on stderr who killed whom and the mutants that nothing kills.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
import pydantic
import pytest
import torch

from tests.mutation.sites import Mutant, mutated, sample
from tests.mutation.table import EQUIVALENT, EVIDENCE

ROOM = Path(__file__).parents[2] / "bilevel"
READY = (hypothesis, pydantic, torch)
"""Imported once here, so that the process of a mutant need not; nothing of bilevel may be."""
OPTIONS = [
    *("-x", "-q", "--no-header"),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
]


class FirstFailure:
    """A pytest plugin that remembers it."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = f"{report.nodeid} (import)"


def plant(mutant: Mutant) -> None:
    """Let the next import of the mutant's module find the changed source."""
    right = importlib.machinery.SourceFileLoader.get_code
    path = ROOM / mutant.file

    def get_code(self: Any, fullname: str) -> Any:
        if Path(self.path) != path:
            return right(self, fullname)
        tree = mutated(path.read_text(encoding="utf-8"), mutant)
        return compile(tree, str(path), "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_code


def judge(mutant: Mutant | None, tests: tuple[str, ...], reply: Connection) -> None:
    """Send (exit code of pytest, first test that failed); in a process of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    if mutant is not None:
        plant(mutant)
    first = FirstFailure()
    code = pytest.main([*OPTIONS, *tests], plugins=[first])
    reply.send((int(code), first.name))
    reply.close()


def verdict(mutant: Mutant | None, tests: tuple[str, ...], seconds: float) -> str | None:
    """What kills a mutant; None where it survives. No mutant: the tests as they are."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=judge, args=(mutant, tests, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(seconds):
            return f"not done after {seconds:.0f} s"
        code, name = mine.recv()
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()
    if code == pytest.ExitCode.USAGE_ERROR and name is None:
        raise SystemExit(f"pytest finds no such tests: {', '.join(tests)}")
    return None if code == 0 else name or f"pytest exits {code}"


@functools.cache
def unharmed(test: str) -> float:
    """Seconds that one entry of the table takes without a mutant; it has to pass."""
    start = time.monotonic()
    broken = verdict(None, (test,), 600.0)
    if broken:
        raise SystemExit(f"without a mutant: {broken}")
    return time.monotonic() - start


def examine(file: str, most: int, only: str) -> tuple[str, list[str]]:
    """(the row of a file, its survivors)."""
    tests = EVIDENCE[file]
    mutants = sample(file, (ROOM / file).read_text(encoding="utf-8"), most)
    mutants = [mutant for mutant in mutants if only in f"{mutant.change} {mutant.reads}"]
    seconds = 20 + 5 * sum(unharmed(test) for test in tests)
    alive, equal = [], 0
    for mutant in mutants:
        killer = verdict(mutant, tests, seconds)
        name = f"{file}:{mutant.line} {mutant.kind}: {mutant.reads}"
        print(f"{name}  [{killer or 'ALIVE'}]", file=sys.stderr, flush=True)
        if killer is None and (file, mutant.reads) in EQUIVALENT:
            equal += 1
        elif killer is None:
            alive.append(name)
    killed = len(mutants) - equal - len(alive)
    return f"| `{file}` | {len(mutants)} | {killed} | {equal} |", alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="such as linear/cg.py; all by default")
    parser.add_argument("--most", type=int, default=12, help="mutants a file")
    parser.add_argument("--only", default="", help="mutants that read so, or were changed so")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| file | mutants | killed | equivalent |\n|---|---|---|---|")
    alive: list[str] = []
    with ThreadPoolExecutor(options.processes) as pool:
        files = options.files or EVIDENCE
        for row, survivors in pool.map(
            lambda file: examine(file, options.most, options.only), files
        ):
            print(row, flush=True)
            alive += survivors
    print("\nalive:", *alive, sep="\n", file=sys.stderr)
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
