"""Splits of pictures with what is said about them, and batches drawn from them with replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .evaluation.evaluation_split import Captions
from .models import pictures
from .models.instructions import Rows
from .models.pictures import Pictures

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """A split that batches are drawn from."""

    pictures: Pictures
    dialogues: Rows
    captions: Captions


def task_batch(data: Data, size: int, stream: torch.Generator) -> Batch:
    """Pictures and conversations about them."""
    index = torch.randint(len(data.pictures), (size,), generator=stream)
    return {**data.pictures.take(index), **data.dialogues.take(index)}


def contrast_batch(data: Data, size: int, stream: torch.Generator) -> Batch:
    """Pictures, each with its caption and hallucinated captions."""
    index = torch.randint(len(data.pictures), (size,), generator=stream)
    return {**data.pictures.take(index), **data.captions.take(index)}


def joined(batches: Sequence[Batch]) -> Batch:
    """Task batches as one, rows padded to the widest; the mask rules the padding out."""
    width = max(batch["ids"].shape[1] for batch in batches)
    rows = {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in batches])
        for name in ("ids", "mask", "counted")
    }
    prefix = torch.cat([batch["prefix"] for batch in batches])
    return {**pictures.joined(batches), **rows, "prefix": prefix}
