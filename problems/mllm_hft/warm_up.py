"""The projector learns to see: the task loss, all else frozen, before anything that is compared.

Stage 1 of LLaVA (Liu et al., 2023, arXiv:2304.08485).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.events import Progress
from bilevel.types import Params

from . import formulations
from .models.cache import Tensors, cached
from .models.instructions import Rows
from .models.network import Network, parameters
from .models.pictures import Pictures
from .models.pretrain import train
from .step_memory import MicroBatch, Step

VERSION = 1
"""Raised when code changes what a warmed-up projector is."""


@dataclass(frozen=True)
class WarmUp:
    """How long, and in what steps."""

    steps: int
    batch: int
    rate: float
    seed: int
    micro_batch: MicroBatch = None


def warm_up(
    network: Network, pictures: Pictures, rows: Rows, how: WarmUp
) -> Generator[Progress, None, None]:
    """Train the network's projector where the network is; cached, in whatever micro-batches."""
    # A copy: training writes into these tensors, and the key is hashed again when it is kept.
    start = tree.clone(parameters(network, "projector"))

    def make() -> Generator[Progress, None, Tensors]:
        yield from _train(network, pictures, rows, how)
        return network.projector.state_dict()

    frozen = {n: v for n, v in network.state_dict().items() if n not in start}
    key = {
        "version": VERSION,
        "start": start,
        "model": frozen,
        "pictures": pictures,
        "dialogues": rows,
        "steps": how.steps,
        "batch": how.batch,
        "rate": how.rate,
        "seed": how.seed,
    }
    network.projector.load_state_dict((yield from cached("projector", key, make)))


def _train(
    network: Network, pictures: Pictures, rows: Rows, how: WarmUp
) -> Generator[Progress, None, None]:
    stream, dtype = rng.stream(how.seed, "warm-up"), network.image_head.weight.dtype

    def drawn(stream: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(rows), (how.batch,), generator=stream)
        return {**rows.take(index), **pictures.take(index)}

    def variables() -> tuple[Params, Params]:
        return {}, parameters(network, "projector")

    def task(at: Params, batch: dict[str, Tensor], size: int | None) -> Tensor:
        return formulations.task(network, at, batch, size)

    def first(on: str) -> dict[str, Tensor]:
        return drawn(torch.Generator().manual_seed(0))

    step = Step(network, task, variables, first, how.batch, dtype, second_order=False)
    size = step.chosen(how.micro_batch, network.device)
    prefix = f"mllm.{network.family.projector}."
    at: Params = {prefix + name: value for name, value in network.projector.named_parameters()}

    def loss() -> Tensor:
        return task(at, tree.to(drawn(stream), network.device, dtype), size)

    yield from train(at.values(), loss, "projector", how.steps, how.rate)
