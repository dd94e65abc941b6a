"""That a batch stays as it was while others are drawn, as the steps that are kept need it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ProblemError

LOOKED_AT = 3
"""Draws: enough for an iterator that fills two buffers in turn."""


class Unwritten:
    """Looks at the first batch again as others are drawn: an iterator may fill one buffer again and again.

    `unroll`, `forward` and whatever else goes back to a batch would then be of another one. It looks at
    the first `LOOKED_AT` draws, at up to 64 numbers of each tensor.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[Any, Tensor] | None = None

    def look(self, batch: Any) -> None:
        """Raise `ProblemError` if to draw this batch has changed the first."""
        if self._first is None:
            self._first = batch, glimpse(batch)
            return
        first, before = self._first
        now = glimpse(first)
        if now.shape != before.shape or not torch.equal(now.nan_to_num(), before.nan_to_num()):
            raise ProblemError(
                f"{self._name}: drawing a batch wrote into one that was drawn before, to which estimators "
                "go back; yield a copy, batch.clone(), in the place of a buffer that is filled again"
            )


def unwritten(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The same batches; of the first `LOOKED_AT` it is seen whether they stay as they are.

    Not by `yield from`, which would close the caller's own generator with this one.
    """
    drawn, seen = iter(batches), Unwritten(name)
    for batch in itertools.islice(drawn, LOOKED_AT):
        seen.look(batch)
        yield batch
    del seen
    for batch in drawn:
        yield batch


def glimpse(batch: Any, most: int = 64) -> Tensor:
    """Up to `most` numbers of each tensor of a batch, evenly spread: enough to tell two apart."""
    seen = [torch.zeros(0, dtype=torch.float64)]
    if isinstance(batch, Mapping):
        seen += [glimpse(batch[key], most) for key in sorted(batch, key=str)]
    elif tree.is_nested(batch):
        seen += [glimpse(part, most) for _, part in tree.parts(batch)]
    else:
        with suppress(TypeError, ValueError, RuntimeError):  # text, or an object of its own kind
            flat = torch.as_tensor(batch).detach().reshape(-1)
            seen.append(flat[:: max(1, len(flat) // most)][:most].cpu().double())
    return torch.cat(seen)
