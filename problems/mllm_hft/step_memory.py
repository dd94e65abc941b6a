"""What one step of a loss will hold, and how many of its rows can pass the language model at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import tree
from bilevel.types import Params

from . import memory
from .memory import SHARE, Footprint, footprint
from .models.network import Network

FEW = 10**8
"""Weights times tokens of a step that is counted with data: its products take a second at most, where
the meta device takes half a second a layer."""
MicroBatch = int | Literal["auto"] | None
"""Rows that pass the language model at a time; None: all of them."""


@dataclass(frozen=True)
class Step:
    """A loss that is differentiated, and what it is taken at."""

    network: Network
    loss: Callable[[Params, Any, int | None], Tensor]
    """(parameters, batch, micro-batch) ↦ loss."""
    variables: Callable[[], tuple[Params, Params]]
    """(constants, what is differentiated) of the layers that the network has when asked."""
    batch: Callable[[str], dict[str, Any]]
    """A batch for the device "cpu" or "meta"."""
    rows: int
    """Of the batch."""
    dtype: torch.dtype
    second_order: bool = True
    """Whether its gradient is differentiated again."""

    def holds(self, size: int | None) -> Footprint:
        """In micro-batches of `size`.

        With data where that is fast. Else, what is held is affine in the number of layers, as they
        are alike: counted are one of them and two.
        """
        network = self.network
        chunks = 1 if size is None else self.rows / size
        weights = tree.size(dict(network.named_parameters()))
        # Without data one chunk stands for all; with data each is computed.
        if chunks <= 4 and weights * _tokens(self.batch("meta")) <= FEW:
            return self.counted("cpu", size)
        layers = network.language.layers
        assert isinstance(layers, torch.nn.ModuleList)
        if len(layers) < 4 or len({_shapes(layer) for layer in layers}) > 1:
            return self.counted("meta", size)
        found = []
        for depth in (1, 2):
            with _cut(network.language, depth):
                found.append(vars(self.counted("meta", size)))
        one, two = found
        return Footprint(**{n: one[n] + (len(layers) - 1) * (two[n] - one[n]) for n in one})

    def counted(self, on: str, size: int | None) -> Footprint:
        """The same, of the network as it is now, on a device."""
        network, (constants, variables) = self.network, self.variables()
        own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        precisions = dict.fromkeys((*constants, *variables), self.dtype)
        precisions |= network.precisions(self.dtype)
        at = {
            name: value.to(on, precisions.get(name))
            for name, value in {**own, **constants, **variables}.items()
        }
        frozen = {name: value for name, value in at.items() if name not in variables}
        found = footprint(
            lambda at, batch: self.loss(at, batch, size),
            frozen,
            {name: at[name] for name in variables},
            tree.to(self.batch(on), on, self.dtype),
            on=on,
            checkpoints=size is not None,
        )
        return found if self.second_order else replace(found, derivative=0, kept=0)

    def chosen(self, asked: MicroBatch, device: torch.device) -> int | None:
        """The micro-batch that is asked for; "auto": what the device has memory for."""
        if asked != "auto":
            return asked
        return largest_that_fits(self.holds, self.rows, memory.capacity(device))[0]


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
