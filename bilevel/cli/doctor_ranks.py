"""`doctor --ranks N`: whether processes of this machine find each other, and sum to the same bits."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from bilevel import ranks as over
from bilevel import recipe, tree
from bilevel.cli.launch import config, quiet
from bilevel.errors import BilevelError, RankError, reason_of
from bilevel.ranks import ALONE, Ranks
from bilevel.recipe.assemble import assemble
from bilevel.run import engine
from bilevel.run.agreement import bits
from bilevel.types import Params

START = "spawn"
"""A process in which CUDA or OpenMP has begun cannot be forked."""
NUMBERS = 1_000_000
ROUNDS = 5
TOLERANCE = 1e-12
RECIPE = """
problem: {name: ridge, data: synthetic}
lower: newton
upper: {steps: 2, optimizer: {name: sgd, lr: 100}}
estimator: {name: implicit, solver: {name: cg, tolerance: 1e-14}}
runtime: {dtype: float64}
"""


@dataclass(frozen=True)
class Told:
    """What one rank found."""

    backend: str
    seconds: float
    """Until the group was formed, from when the rank had imported what it needs."""
    off: float
    """The largest error of a sum of integers, which float64 holds exactly."""
    agrees: bool
    """Whether a sum of numbers that are rounded is the same bits on every rank."""
    one: float
    """Seconds of a sum of one number, in the median."""
    many: float
    """Seconds of a sum of `NUMBERS` numbers of 4 bytes, in the median."""
    run: float | str
    """The error of how far x moves in a run over the ranks, relative to one rank on the whole batch;
    where such a run is refused, why."""


def gather(size: int) -> list[Told]:
    """What each of so many new processes found, in the order of the ranks.

    Raises:
        RankError: one of them failed, or they did not find each other; its own error is said.
    """
    device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= size else "cpu"
    with tempfile.TemporaryDirectory(prefix="bilevel-") as folder, quiet():
        chosen = config(size, start=START, words=folder)
        try:
            found = elastic_launch(chosen, look)(device)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            said: Any = failure.message
            said = said["message"] if isinstance(said, dict) else said
            raise RankError(f"rank {rank} of {size} failed: {said}") from None
    return [found[rank] for rank in range(size)]


def look(device: str) -> Told:
    """What this process finds, as one of the ranks that its environment announces."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    ranks = over.join(device, timeout=60.0)
    try:
        return _look(ranks, torch.device(device, ranks.local) if device == "cuda" else "cpu", began)
    finally:
        over.depart()


def _look(ranks: Ranks, device: torch.device | str, began: float) -> Told:
    from torch import distributed

    ranks.every(0)  # a group is formed when it is first used
    seconds = time.perf_counter() - began
    own = torch.arange(1000.0, dtype=torch.float64, device=device) * (ranks.rank + 1)
    whole = torch.arange(1000.0, dtype=torch.float64) * (ranks.size * (ranks.size + 1) // 2)
    stream = torch.Generator().manual_seed(ranks.rank)
    rounded = ranks.sum_of(torch.randn(1000, generator=stream).to(device))
    return Told(
        backend=distributed.get_backend(ranks.group),
        seconds=seconds,
        off=float((ranks.sum_of(own).cpu() - whole).abs().max()),
        agrees=len({*ranks.gather(bits({"sum": rounded}))}) == 1,
        one=_median(ranks, torch.zeros(1, device=device)),
        many=_median(ranks, torch.zeros(NUMBERS, device=device)),
        run=_run(ranks, torch.device(device).type),
    )


def _median(ranks: Ranks, value: torch.Tensor) -> float:
    """Seconds that a sum takes, its arrival on the CPU included."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        float(ranks.sum_of(value)[0])
        taken.append(time.perf_counter() - began)
    return sorted(taken)[ROUNDS // 2]


def _run(ranks: Ranks, kind: str) -> float | str:
    chosen = recipe.loads(RECIPE, [f"runtime.device={kind}"])

    def steps(ranks: Ranks) -> Params:
        setup = assemble(chosen, ranks)
        state = engine.start(setup)
        before = tree.clone(state.x)
        list(engine.run(setup, state))
        return tree.sub(state.x, before)

    with over.apart():
        alone = steps(ALONE)
    try:
        return tree.norm(tree.sub(steps(ranks), alone)) / tree.norm(alone)
    except BilevelError as error:
        return reason_of(error)
