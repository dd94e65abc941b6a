"""Rows that are longer than what a language model was made for, which it reads without a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel.events import Warned

from .evaluation.evaluation_split import Captions
from .models.instructions import Rows
from .models.network import Network
from .models.pictures import PADDING, Pictures
from .sources.protocol import Scene, Split


def too_long(
    network: Network,
    split: Split,
    scenes: Sequence[Scene],
    pictures: Pictures,
    dialogues: Rows,
    captions: Captions,
    talked: Int[Tensor, "row"] | None = None,
) -> list[Warned]:
    """A warning of the scenes whose conversation or caption has more tokens than positions.

    A conversation counts with its picture and what stands before it. `talked` is the scene of each
    conversation, None where they are of all scenes in order. Positions are `max_position_embeddings` of the
    language model's config; rotary embeddings go on beyond them, and no model was trained there.
    """
    limit = getattr(network.mllm.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return []
    rows = torch.arange(len(scenes)) if talked is None else talked
    whole = dialogues.mask.sum(1) + len(network.before) + _places(pictures)[rows]
    length = captions.mask.sum(-1).amax(1).scatter_reduce(0, rows, whole, "amax")
    found = int((length > limit).sum())
    if not found:
        return []
    longest = int(length.argmax())
    return [
        Warned(
            0,
            f"length in {split}",
            f"{found} of {len(scenes)} {split} pictures have more tokens, with what is said of them, than the "
            f"{limit:,} positions that the language model was made for (max_position_embeddings); the most, "
            f"{int(length[longest]):,}, has {scenes[longest].id or longest!r}: shorten what is said of them, "
            "or leave them out",
        )
    ]


def _places(pictures: Pictures) -> Int[Tensor, "scene"]:
    """How many places each picture has."""
    if pictures.layout is None:
        return torch.full((len(pictures),), pictures.features.shape[1])
    return (pictures.layout != PADDING).sum(1)
