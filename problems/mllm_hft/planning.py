"""How a run divides its rows, from what they hold and what the device has; said before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.events import Progress
from bilevel.types import Params

from . import formulations, memory
from .evaluation.evaluation_split import EvaluationSplit
from .lower_batches import lower_batches
from .memory import Footprint, rows_at_a_time, spelled
from .models.instructions import prompt_ids
from .models.network import LoadedModel
from .preference_pairs import reference_shapes
from .preparation import Prepared, start
from .step_memory import Step, largest_that_fits

if TYPE_CHECKING:
    from .problem import HierarchicalFineTuning

MOST_ROWS = 128
"""Beyond so many rows at a time an evaluation is no faster."""


@dataclass(frozen=True)
class Plan:
    """What a run holds, in bytes, and how many rows it takes at a time."""

    step: Footprint
    micro_batch: int | None
    rows: int
    """Pictures that are captioned, and questions that are answered, at a time."""
    tokens: int
    """Of the longest sequence that captioning decodes."""
    cache: int
    """KV cache of one such sequence."""
    features: int
    """Of all pictures, in files that are mapped."""

    def told(self) -> list[Progress]:
        """What a run says of it."""
        size = self.micro_batch
        pieces = "" if size is None else f"; micro-batches of {size}"
        return [
            Progress("memory of a lower step", 1, 1, f"at least {self.step}{pieces}"),
            Progress(
                "memory of an evaluation",
                1,
                1,
                f"KV cache {spelled(self.rows * self.cache)} for {self.rows} captions at a time; "
                f"features {spelled(self.features)}, mapped from the cache",
            ),
        ]


def plan(
    problem: HierarchicalFineTuning, prepared: Prepared, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Shapes go through the model on the meta device; a step small enough is taken with data."""
    room, lower = memory.capacity(device), lower_step(problem, prepared, dtype)
    if problem.micro_batch == "auto":
        size, step = largest_that_fits(lower.holds, lower.rows, room)
    else:
        size, step = problem.micro_batch, lower.holds(problem.micro_batch)
    splits = prepared.train.pictures, prepared.upper.pictures, prepared.evaluation.pictures
    features = sum(v.nbytes for pictures in splits for v in pictures.tensors().values())
    tokens = _caption(prepared.loaded, prepared.evaluation, problem.caption_tokens)
    cache, attention = prepared.loaded.network.decoding_bytes(tokens)
    rows = rows_at_a_time(cache + attention, step.weights, device, MOST_ROWS)
    return Plan(step, size, rows, tokens, cache, features)


def lower_step(problem: HierarchicalFineTuning, prepared: Prepared, dtype: torch.dtype) -> Step:
    """The first lower step, without its queue, whose states are a constant of the batch."""
    network = prepared.loaded.network
    drawn = next(lower_batches(problem, prepared, torch.Generator().manual_seed(0), None))

    def variables() -> tuple[Params, Params]:
        x, y = start(problem, prepared, None)
        return {**prepared.constants, **x}, y

    def batch(on: str) -> dict[str, Any]:
        if problem.form.loss == "hacl":
            return drawn
        words = network.mllm.lm_head.out_features
        return {**drawn, "contrast": reference_shapes(drawn["contrast"], words, on)}

    def loss(at: Params, batch: dict[str, Any], size: int | None) -> Tensor:
        return formulations.lower(
            problem.form,
            network,
            at,
            batch,
            anchor=problem.anchor,
            reference={name: at[name].detach() for name in prepared.reference},
            micro_batch=size,
        )

    rows = max(problem.lower_batch, problem.contrast_batch)
    return Step(network, loss, variables, batch, rows, dtype)


def _caption(loaded: LoadedModel, evaluation: EvaluationSplit, length: int) -> int:
    """Tokens of the longest sequence that captioning decodes."""
    asked = {scene.instruction for scene in evaluation.scenes}
    prompt = max(len(prompt_ids(text, loaded.tokenizer, loaded.template)) for text in asked)
    places = evaluation.pictures.features.shape[1]
    return len(loaded.network.before) + places + prompt + length
