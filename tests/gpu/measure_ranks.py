"""What ranks cost on a device: `python -m tests.gpu.measure_ranks`, a table for docs/many_devices.md.

A Hessian product of a small transformer's loss, alone and over ranks: one rank of a group of its own,
whose sums are of nothing (what spreading costs), and two that share the one device by gloo, which have
all of y each, or half of it, with graphs that keep wholes or gather them again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import calculus, tree
from bilevel.problem.levels import Levels
from bilevel.problem.sharded import sharded
from bilevel.problem.spread import spread
from bilevel.ranks import ALONE, Ranks
from bilevel.run import Setup, Upper, engine
from bilevel.run.upper_step import advance
from bilevel.runfolder import checkpoint
from bilevel.sharding.again import gathering_again
from bilevel.sharding.parts import Keep, teams
from bilevel.types import Params, Point
from tests.ranks import on_ranks

ROUNDS = 7


@dataclass(frozen=True)
class Size:
    """Of the transformer and of its batch."""

    width: int = 512
    layers: int = 4
    tokens: int = 128
    words: int = 4096
    rows: int = 16


class Transformer:
    """Next words by a transformer; x is the logarithm of the weight of each row."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.dtype = size, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(
                size.width, 4, 2 * size.width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.model = nn.Sequential(
                nn.Embedding(size.words, size.width),
                nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False),
                nn.Linear(size.width, size.words),
            ).to(dtype)

    def init(self, streams: Any) -> tuple[Params, Params]:
        x = {"log_weight": torch.zeros(self.size.rows, dtype=self.dtype)}
        return x, {name: entry.detach() for name, entry in self.model.named_parameters()}

    def batch(self) -> dict[str, Tensor]:
        stream = torch.Generator().manual_seed(1)
        shape = self.size.rows, self.size.tokens + 1
        words = torch.randint(self.size.words, shape, generator=stream)
        return {"words": words, "row": torch.arange(self.size.rows)}

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        while True:
            yield self.batch()

    upper_batches = lower_batches

    def lower_loss(self, x: Params, y: Params, batch: dict[str, Tensor]) -> Tensor:
        words = batch["words"]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = functional_call(self.model, y, (words[:, :-1],))
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), words[:, 1:].flatten(), reduction="none"
        )
        return (x["log_weight"][batch["row"]].exp() * losses.view(len(words), -1).mean(1)).mean()

    upper_loss = lower_loss


@dataclass(frozen=True)
class Product:
    """Of a Hessian product of the lower loss and a vector."""

    seconds: float
    """In the median."""
    calls: int
    """Sums over ranks."""
    bytes: int
    peak: int
    """Bytes that the device had at most, of tensors; 0 on a CPU."""
    norm: float


def product(
    ranks: Ranks, size: Size, device: str, dtype: torch.dtype, keep: Keep | None = None
) -> Product:
    """Of the loss over these ranks; with `keep`, all of them hold y together."""
    problem = Transformer(size, dtype)
    x, y = (tree.to(params, torch.device(device), dtype) for params in problem.init(None))
    if keep:
        ranks = teams(ranks, shard=ranks.size, keep=keep)
        ranks.team.levels = {"y"}
        levels = Levels(sharded(spread(problem, ranks), ranks.team))
        y = ranks.team.cut(y)
    else:
        levels = Levels(spread(problem, ranks))
    batch = {name: entry.to(device) for name, entry in problem.batch().items()}
    losses, at = levels.losses(batch, batch), Point(x, y)
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with gathering_again(ranks):
        linearized = calculus.linearize(losses.lower, at)
        found = linearized.hvp_yy(y)
        mark = ranks.ledger.mark()
        taken = [_seconds(lambda: linearized.hvp_yy(y), device) for _ in range(ROUNDS)]
        calls, sent = ranks.ledger.since(mark)
    return Product(
        statistics.median(taken),
        calls // ROUNDS,
        sent // ROUNDS,
        torch.cuda.max_memory_allocated(device) if is_cuda else 0,
        tree.norm(found),
    )


def _seconds(function: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measured(
    device: str, size: Size, dtype: torch.dtype = torch.float32, start: str = "spawn"
) -> dict[str, Product]:
    """By what computes it."""
    arguments = {"size": size, "device": device, "dtype": dtype}
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    work = functools.partial(product, **arguments)
    found = {"one process": product(ALONE, **arguments)}
    for name, ranks, group, keep in (
        (f"one rank, {backend.split(':')[-1]}", 1, backend, None),
        ("two ranks on the device, gloo", 2, "gloo", None),
        ("the same, half of y each, `whole`", 2, "gloo", "whole"),
        ("the same, half of y each, `again`", 2, "gloo", "again"),
    ):
        one = on_ranks(
            ranks, functools.partial(work, keep=keep), 600.0, start=start, backend=group
        )[0]
        if isinstance(one, Exception):
            raise one
        found[name] = one
    return found


@dataclass(frozen=True)
class Saving:
    """Of the state of a run whose y two ranks hold together, after a step, in seconds."""

    gathered: float
    written: float
    read: float
    """And cut, on every rank."""
    bytes: int
    """Of the checkpoint."""
    is_same: bool


def saving(ranks: Ranks, size: Size, device: str, dtype: torch.dtype) -> Saving:
    """Where the ranks are one team."""
    ranks = teams(ranks, shard=ranks.size)
    setup = Setup(
        spread(Transformer(size, dtype), ranks), "gradient", Upper(steps=9), "one_step",
        ranks=ranks, device=torch.device(device), dtype=dtype,
    )  # fmt: skip
    state = engine.start(setup)
    list(advance(setup, state))
    taken = [time.perf_counter()]
    whole = state.save()
    taken.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as own:
        if ranks.is_first:
            checkpoint.save(Path(own), {"state": whole}, step=1)
        folder = Path(ranks.from_first(own))
        taken.append(time.perf_counter())
        path = next(folder.iterdir())
        found = engine.restore(setup, checkpoint.load(path)["state"])
        taken.append(time.perf_counter())
        count = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        ranks.every(0)  # the first removes the folder
    gathered, written, read = (after - before for before, after in pairwise(taken))
    return Saving(gathered, written, read, count, tree.equal(found.y, state.y))


def saved(
    device: str, size: Size, dtype: torch.dtype = torch.float32, start: str = "spawn"
) -> Saving:
    """By two ranks on the device."""
    work = functools.partial(saving, size=size, device=device, dtype=dtype)
    one = on_ranks(2, work, 600.0, start=start)[0]
    if isinstance(one, Exception):
        raise one
    return one


def table(found: dict[str, Product]) -> str:
    """As the page has it."""
    alone = found["one process"]
    lines = [
        "| | time of a product | sums | MB sent | memory, MB | off |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        off = abs(one.norm / alone.norm - 1)
        ratio = one.seconds / alone.seconds
        lines.append(
            f"| {name} | {1e3 * one.seconds:.1f} ms, {ratio:.2f} times | {one.calls} "
            f"| {one.bytes / 1e6:.1f} | {one.peak / 1e6:,.0f} | {off:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    device = parser.parse_args().device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("what ranks cost is not measured: no CUDA device")
        return
    # on a GPU one of some hundred million numbers
    size = Size(width=1024, layers=8, words=32_000) if device.startswith("cuda") else Size()
    count = sum(entry.numel() for entry in Transformer(size).init(None)[1].values())
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "a CPU"
    print(f"{name}, torch {torch.__version__}, y of {count / 1e6:.1f} million numbers, float32\n")
    print(table(measured(device, size)))
    found = saved(device, size)
    print(
        f"\nA checkpoint of {found.bytes / 1e6:,.0f} MB: gathered in {found.gathered:.2f} s, written in "
        f"{found.written:.2f} s, read and cut in {found.read:.2f} s; "
        f"{'the same bits' if found.is_same else 'NOT THE SAME BITS'}."
    )


if __name__ == "__main__":
    main()
