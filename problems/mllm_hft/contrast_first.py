"""Contrast, then task: L_C alone on projector, heads and LoRA, before the first lower step.

The arm that takes the two losses one after the other, where `joint` takes both at once.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.events import Progress
from bilevel.types import Params

from . import formulations
from .lower_batches import contrast
from .models.adapters import start_lora
from .models.cache import Tensors, cached
from .models.network import parameters
from .models.pretrain import train
from .preference_pairs import reference_shapes, with_reference
from .queue import StartStates
from .step_memory import Step

if TYPE_CHECKING:
    from .preparation import Prepared
    from .problem import HierarchicalFineTuning

VERSION = 1
"""Raised when code changes what this stage makes."""


def contrast_first(
    problem: HierarchicalFineTuning, prepared: Prepared
) -> Generator[Progress, None, Params]:
    """Projector, heads and LoRA after `problem.contrast_first` steps of Adam on L_C; cached.

    L_C is that of the lower level (`contrast_loss`, `negatives`, `queue`), in its micro-batches; a
    preference has no heads. Begins at the warmed-up model, which is the reference of a preference;
    τ and the weights stay. LoRA, batches and their order come from `problem.seed`.
    """
    network, data = prepared.loaded.network, prepared.train
    first = {
        **parameters(network, "projector"),
        **(parameters(network, "heads") if problem.contrast_loss == "hacl" else {}),
        **start_lora(network, rng.stream(problem.seed, "contrast_first.lora")),
    }
    start = tree.to(first, network.device, torch.float32)

    def make() -> Generator[Progress, None, Tensors]:
        at = tree.clone(start)
        yield from train(
            at.values(),
            _loss(problem, prepared, at),
            "contrast first",
            problem.contrast_first,
            problem.warm_up_rate,
        )
        return tree.detach(at)

    key = {
        "version": VERSION,
        "start": start,
        "scalars": prepared.constants,
        "model": {n: v for n, v in network.state_dict().items() if n not in start},
        "pictures": data.pictures,
        "captions": data.captions,
        "pairs": prepared.pairs,
        "loss": [problem.contrast_loss, problem.negatives, problem.queue],
        "steps": problem.contrast_first,
        "batch": problem.contrast_batch,
        "rate": problem.warm_up_rate,
        "seed": problem.seed,
    }
    return (yield from cached("contrast", key, make))


def _loss(problem: HierarchicalFineTuning, prepared: Prepared, at: Params) -> Any:
    """L_C at `at`, on another batch each time that it is called."""
    network, device = prepared.loaded.network, prepared.device
    is_preference = problem.contrast_loss != "hacl"

    def refinement(at: Params, batch: dict[str, Any], size: int | None) -> Tensor:
        return formulations.refinement(problem.contrast_loss, network, at, batch, size)

    def variables() -> tuple[Params, Params]:
        names = {name for name, _ in network.named_parameters()}
        return prepared.constants, {n: v.detach() for n, v in at.items() if n in names}

    def first(on: str) -> dict[str, Any]:
        batch = contrast(problem, prepared, torch.Generator().manual_seed(0), None)
        words = network.mllm.lm_head.out_features
        return reference_shapes(batch, words, on) if is_preference else batch

    rows = problem.contrast_batch
    step = Step(network, refinement, variables, first, rows, torch.float32, second_order=False)
    size = step.chosen(problem.micro_batch, device)
    states = (
        StartStates(
            network, prepared.train.pictures, prepared.train.captions, device, torch.float32,
            size or rows,
        )
        if problem.queue
        else None
    )  # fmt: skip
    stream = rng.stream(problem.seed, "contrast_first")

    def loss() -> Tensor:
        batch = contrast(problem, prepared, stream, states)
        if is_preference:
            batch = with_reference(network, batch, device, torch.float32, size)
        there = tree.to(batch, device, torch.float32)
        return refinement({**prepared.constants, **at}, there, size)

    return loss
