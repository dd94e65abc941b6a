"""How a run divides its rows, from what they hold and what the device has; said before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.events import Progress
from bilevel.types import Params

from . import formulations, memory
from .evaluation.evaluation_split import EvaluationSplit
from .lower_batches import lower_batches
from .memory import Footprint, footprint, spelled
from .models.instructions import prompt_ids
from .models.network import LoadedModel
from .preference_pairs import reference_shapes
from .preparation import Prepared, start

if TYPE_CHECKING:
    from .problem import HierarchicalFineTuning

SHARE = 0.75
"""Of a device's memory, for what is counted; the rest is for temporaries, gradients, optimizer states."""
MOST_ROWS = 128
"""Beyond so many rows at a time an evaluation is no faster."""
FEW = 10**8
"""Weights times tokens of a step that is counted with data: its products take a second at most, where
the meta device takes half a second a layer."""


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
    """Of all pictures, on the host."""

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
                f"features {spelled(self.features)}, on the host",
            ),
        ]


def plan(
    problem: HierarchicalFineTuning, prepared: Prepared, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Shapes go through the model on the meta device; a step small enough is taken with data."""
    room = memory.capacity(device)

    def needed(size: int | None) -> Footprint:
        return lower_step(problem, prepared, dtype, size)

    if problem.micro_batch == "auto":
        largest = max(problem.lower_batch, problem.contrast_batch)
        size, step = largest_that_fits(needed, largest, room)
    else:
        size, step = problem.micro_batch, needed(problem.micro_batch)
    splits = prepared.train.pictures, prepared.upper.pictures, prepared.evaluation.pictures
    features = sum(v.nbytes for pictures in splits for v in pictures.tensors().values())
    tokens = _caption(prepared.loaded, prepared.evaluation, problem.caption_tokens)
    cache, attention = prepared.loaded.network.decoding_bytes(tokens)
    rows = MOST_ROWS
    if room is not None:
        rows = int((SHARE * room - step.weights) // (cache + attention))
    return Plan(step, size, max(1, min(rows, MOST_ROWS)), tokens, cache, features)


def largest_that_fits(
    needed: Callable[[int | None], Footprint], largest: int, room: int | None
) -> tuple[int | None, Footprint]:
    """The micro-batch and what a step holds with it.

    None where all rows fit, else the largest power of two for which weights, gradient and derivative
    do; 1 where none does. Fitting is taking no more than `SHARE` of `room`.
    """
    whole = needed(None)
    if room is None or whole.of_second_order <= SHARE * room:
        return None, whole
    size, found = 1, needed(1)
    while 2 * size < largest:
        more = needed(2 * size)
        if more.of_second_order > SHARE * room:
            break
        size, found = 2 * size, more
    return size, found


def lower_step(
    problem: HierarchicalFineTuning, prepared: Prepared, dtype: torch.dtype, size: int | None
) -> Footprint:
    """Of the first lower step, without its queue, whose states are a constant of the batch.

    With data where that is fast. Else, what is held is affine in the number of layers, as they are
    alike: counted are one of them and two.
    """
    batch = next(lower_batches(problem, prepared, torch.Generator().manual_seed(0), None))
    network = prepared.loaded.network

    def counted(on: str) -> Footprint:
        return _counted(problem, prepared, dtype, size, batch, on)

    chunks = 1 if size is None else max(problem.lower_batch, problem.contrast_batch) / size
    # Without data one chunk stands for all; with data each is computed.
    if chunks <= 4 and tree.size(dict(network.named_parameters())) * _tokens(batch) <= FEW:
        return counted("cpu")
    layers = network.language.layers
    assert isinstance(layers, torch.nn.ModuleList)
    if len(layers) < 4 or len({_shapes(layer) for layer in layers}) > 1:
        return counted("meta")
    found = []
    for depth in (1, 2):
        with _cut(network.language, depth):
            found.append(vars(counted("meta")))
    one, two = found
    return Footprint(**{n: one[n] + (len(layers) - 1) * (two[n] - one[n]) for n in one})


def _counted(
    problem: HierarchicalFineTuning,
    prepared: Prepared,
    dtype: torch.dtype,
    size: int | None,
    batch: dict[str, Any],
    on: str,
) -> Footprint:
    """`lower_step` on a device, of the network as it is now."""
    network = prepared.loaded.network
    if problem.form.loss != "hacl":
        words = network.mllm.lm_head.out_features
        batch = {**batch, "contrast": reference_shapes(batch["contrast"], words, on)}
    x, y = start(problem, prepared, None)
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    precisions = dict.fromkeys((*x, *y), dtype) | network.precisions(dtype)
    at = {
        name: value.to(on, precisions.get(name))
        for name, value in {**own, **prepared.constants, **x, **y}.items()
    }
    anchors = {name: at[name] for name in prepared.reference}

    def loss(at: Params, batch: dict[str, Any]) -> Tensor:
        return formulations.lower(
            problem.form,
            network,
            at,
            batch,
            anchor=problem.anchor,
            reference=anchors,
            micro_batch=size,
        )

    frozen = {name: value for name, value in at.items() if name not in y}
    trained = {name: at[name] for name in y}
    moved = tree.to(batch, on, dtype)
    return footprint(loss, frozen, trained, moved, on=on, checkpoints=size is not None)


@contextmanager
def _cut(decoder: Any, depth: int) -> Iterator[None]:
    """The decoder with its first layers alone."""
    layers = decoder.layers
    decoder.layers = layers[:depth]
    try:
        yield
    finally:
        decoder.layers = layers


def _shapes(layer: torch.nn.Module) -> frozenset[tuple[str, torch.Size, torch.dtype]]:
    return frozenset((name, p.shape, p.dtype) for name, p in layer.named_parameters())


def _tokens(batch: dict[str, Any]) -> int:
    """Places of all sequences that pass the language model, about."""
    found = 0

    def count(leaf: Any) -> None:
        nonlocal found
        if isinstance(leaf, Tensor) and leaf.ndim > 1:
            found += leaf.shape[:-1].numel() if leaf.is_floating_point() else leaf.numel()

    tree.map_nested(count, batch)
    return found


def _caption(loaded: LoadedModel, evaluation: EvaluationSplit, length: int) -> int:
    """Tokens of the longest sequence that captioning decodes."""
    asked = {scene.instruction for scene in evaluation.scenes}
    prompt = max(len(prompt_ids(text, loaded.tokenizer, loaded.template)) for text in asked)
    places = evaluation.pictures.features.shape[1]
    return len(loaded.network.before) + places + prompt + length
