"""Training pictures that a model of the clean ones finds likeliest, and no others: a baseline for weights of sources.

Projector and LoRA learn the task from the upper data alone, beginning at the warmed-up model; then the training
pictures whose answers it finds likeliest by the token stay, from whatever source they come. It sees false
labels one by one, where a weight is of a whole source, and no bias of true ones.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.events import Progress
from bilevel.types import Params

from . import formulations
from .batches import Data, task_batch
from .models.adapters import start_lora
from .models.cache import Tensors, cached
from .models.network import Network, chunks, parameters
from .models.pretrain import train

if TYPE_CHECKING:
    from .problem import HierarchicalFineTuning

VERSION = 1
"""Raised when code changes which pictures stay."""
STEPS = 100
"""Of Adam on the clean pictures, at `warm_up_rate`: many more and a few dozen pictures are known by heart."""
ROWS = 128


def filtered(
    problem: HierarchicalFineTuning, network: Network, data: Data, clean: Data, device: torch.device
) -> Generator[Progress, None, Data]:
    """`data` of which the share `problem.kept` is drawn, as one source; the losses that decide are cached.

    Costs 100 gradients of a lower batch and one evaluation of every training conversation.
    """
    start: Params = {
        **parameters(network, "projector"),
        **start_lora(network, rng.stream(problem.seed, "filter.lora")),
    }
    start = tree.to(start, device, torch.float32)

    def make() -> Generator[Progress, None, Tensors]:
        at, stream = tree.clone(start), rng.stream(problem.seed, "filter")

        def loss() -> Tensor:
            batch = task_batch(clean, problem.lower_batch, stream)
            return formulations.task(network, at, tree.to(batch, device, torch.float32))

        yield from train(at.values(), loss, "clean pictures alone", STEPS, problem.warm_up_rate)
        return {"loss": _losses(network, tree.detach(at), data, device)}

    key = {
        "version": VERSION,
        "start": start,
        "model": {n: v for n, v in network.state_dict().items() if n not in start},
        "clean": [clean.pictures, clean.dialogues],
        "pictures": data.pictures,
        "dialogues": data.dialogues,
        "steps": STEPS,
        "batch": problem.lower_batch,
        "rate": problem.warm_up_rate,
        "seed": problem.seed,
    }
    losses = (yield from cached("filter", key, make))["loss"]
    number = max(1, round(problem.kept * len(losses)))
    stay = losses.argsort(stable=True)[:number].sort().values
    return replace(data, origin=None, drawn_from=stay)


@torch.no_grad()
def _losses(network: Network, at: Params, data: Data, device: torch.device) -> Tensor:
    """The mean loss of an answer token of each picture's conversation; infinite where it has no answer."""
    found = []
    for part in chunks(len(data.dialogues), ROWS):
        index = torch.arange(len(data.dialogues))[part]
        batch = {**data.of(index), **data.dialogues.take(index)}
        batch = tree.to(batch, device, torch.float32)
        each, counted = formulations.row_losses(network, at, batch), batch["counted"].sum(1)
        found.append(torch.where(counted > 0, each / counted, torch.inf).cpu())
    return torch.cat(found)
