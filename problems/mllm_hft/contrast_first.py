"""Contrast, then task: L_C alone on projector, heads and LoRA, before the first lower step.

The arm that takes the two losses one after the other, where `joint` takes both at once.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from torch import Tensor

from bilevel import rng, tree
from bilevel.events import Progress
from bilevel.types import Params

from . import formulations
from .batches import Data, contrast_batch
from .models.adapters import start_lora
from .models.cache import Tensors, cached
from .models.network import LoadedModel, parameters
from .models.pretrain import train

if TYPE_CHECKING:
    from .problem import HierarchicalFineTuning

VERSION = 1
"""Raised when code changes what this stage makes."""


def contrast_first(
    problem: HierarchicalFineTuning, loaded: LoadedModel, data: Data, scalars: Params
) -> Generator[Progress, None, Params]:
    """Projector, heads and LoRA after `problem.contrast_first` steps of Adam on HACL's L_C; cached.

    Begins at the warmed-up model; `scalars` hold τ and the weights, which stay. LoRA, batches and
    their order come from `problem.seed`.
    """
    network = loaded.network
    start = {
        **parameters(network, "projector"),
        **parameters(network, "heads"),
        **start_lora(network, rng.stream(problem.seed, "contrast_first.lora")),
    }

    def make() -> Generator[Progress, None, Tensors]:
        stream = rng.stream(problem.seed, "contrast_first")
        at = {name: value.detach().clone() for name, value in start.items()}

        def loss() -> Tensor:
            batch = contrast_batch(data, problem.contrast_batch, stream)
            return formulations.contrast(network, {**scalars, **at}, batch)

        yield from train(
            at.values(), loss, "contrast first", problem.contrast_first, problem.warm_up_rate
        )
        return tree.detach(at)

    key = {
        "version": VERSION,
        "start": start,
        "scalars": scalars,
        "model": {n: v for n, v in network.state_dict().items() if n not in start},
        "pictures": data.pictures,
        "captions": data.captions,
        "steps": problem.contrast_first,
        "batch": problem.contrast_batch,
        "rate": problem.warm_up_rate,
        "seed": problem.seed,
    }
    return (yield from cached("contrast", key, make))
