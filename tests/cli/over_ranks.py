"""The command line over ranks: processes forked from the test, as a launcher would start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import distributed

from bilevel.cli.app import app
from tests.cli.commands import RUNNER

PROBLEM = '''
import os, signal, sys, time
from pathlib import Path
import torch


def act(stage):
    """What ACTS in the environment says of this rank here, once: "1:3:SIGKILL" at the batch of step 3."""
    own = os.environ.get("RANK", "0")
    for rank, at, what in (each.split(":") for each in os.environ.get("ACTS", "").split()):
        mark = Path(__file__).parent / f"did-{own}-{at}-{what}"
        if rank not in (own, "*") or at != str(stage) or mark.exists():
            continue
        mark.touch()
        if what == "raise":
            raise KeyError("mine")
        if what == "exit":
            os._exit(9)
        if what == "sleep":
            return time.sleep(2.0) or 1.0
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if what == "nan":
            return float("nan")
        if what == "twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # a handler runs between two steps of Python
            what = "SIGINT"
        os.kill(os.getpid(), getattr(signal, what))
    return 1.0


class Rows:
    def prepare(self):
        act("prepare")
        yield from ()

    def init(self, streams):
        act("init")
        return {"x": torch.zeros(3)}, {"y": torch.zeros(3)}

    def batches(self, stream):
        a = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        step = 0
        while True:
            step += 1
            rows = torch.randperm(7, generator=stream)[:5]
            yield {"a": a[rows], "b": a[rows].sum(1).sin() * act(step)}

    upper_batches = batches

    def lower_batches(self, stream):
        return self.quiet(stream)

    def quiet(self, stream):
        a = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
        while True:
            rows = torch.randperm(7, generator=stream)[:6]
            yield {"a": a[rows], "b": a[rows].sum(1).cos()}

    def upper_loss(self, x, y, batch):
        return (batch["a"] @ y["y"] - batch["b"]).square().mean()

    def lower_loss(self, x, y, batch):
        return (batch["a"] @ y["y"] - batch["b"]).square().mean() + (x["x"].exp() * y["y"] ** 2).sum()

    evaluations = 0

    def evaluate(self, x, y):
        Rows.evaluations += 1
        act(f"evaluate{self.evaluations}")
        return {"size": float(x["x"].square().sum())}


class Narrow(Rows):
    def batches(self, stream):
        return ({"a": batch["a"][:1], "b": batch["b"][:1]} for batch in self.quiet(stream))

    upper_batches = lower_batches = batches
'''
RECIPE = """
problem: rows.py:Rows
lower: {name: gradient, steps: 3, optimizer: {name: sgd, lr: 0.05}}
upper: {steps: 6, optimizer: {name: adam, lr: 0.1}}
estimator: {name: implicit, solver: {name: cg, iterations: 3}}
evaluate: {held: false}
checkpoint: {every: 4}
runtime: {dtype: float64, device: cpu}
report: false
sinks: [jsonl]
"""


def recipe(folder: Path) -> Path:
    """A recipe of unequal parts and of batches that are drawn, whose ranks do what they are told to."""
    (folder / "rows.py").write_text(PROBLEM)
    path = folder / "rows.yaml"
    path.write_text(RECIPE)
    return path


@dataclass
class Ended:
    """How a rank ended; by a signal with its negative number, and nothing said."""

    code: int
    output: str = ""
    stderr: str = ""


def on_command_line(
    size: int,
    *arguments: object,
    acts: str = "",
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[Ended]:
    """How each rank of a command ends that a launcher starts; `meanwhile` gets their process ids.

    As torch's agent does, it has a store that outlives the ranks, and ends those that are left with
    SIGTERM once one has failed.
    """
    store = distributed.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))
    words = [str(argument) for argument in arguments]
    told = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
        "ACTS": acts,
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        context = multiprocessing.get_context("fork")
        ranks: list[BaseProcess] = [
            context.Process(target=_one, args=(rank, told, words, folder)) for rank in range(size)
        ]
        for each in ranks:
            each.start()
        if meanwhile:
            meanwhile([each.pid for each in ranks if each.pid])
        _watch(ranks)
        return [_ended(each, Path(folder, str(rank))) for rank, each in enumerate(ranks)]


def _one(rank: int, told: Mapping[str, str], words: list[str], folder: str) -> None:
    os.environ |= {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    found = RUNNER.invoke(app, words)
    said = found.stderr
    if found.exception and not isinstance(found.exception, SystemExit):
        said += "".join(traceback.format_exception(found.exception))
    Path(folder, str(rank)).write_text(json.dumps([found.stdout, said]))
    sys.exit(found.exit_code)


def _watch(ranks: list[BaseProcess]) -> None:
    until, is_ending = time.monotonic() + 60, False
    while any(each.is_alive() for each in ranks):
        if not is_ending and any(each.exitcode for each in ranks):
            is_ending = True
            for each in ranks:
                if each.is_alive() and each.pid:
                    os.kill(each.pid, signal.SIGTERM)
        if time.monotonic() > until:
            for each in ranks:
                each.kill()
            raise AssertionError("ranks wait for each other")
        time.sleep(0.02)


def _ended(process: BaseProcess, file: Path) -> Ended:
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, *(json.loads(file.read_text()) if file.exists() else ()))
