"""What a lower step will hold, counted before it is taken: on the meta device, where tensors have no data.

Counted are the weights and the tensors that autograd saves, each storage once, for G and for its
gradient where that is to be differentiated. It is a lower bound: temporaries, gradients, optimizer
states and the batch are not in it, and a path of K unrolled steps saves K times as much.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import RequirementError
from bilevel.types import Params

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes."""

    weights: int
    graph: int
    """Saved by the forward of G: held until its gradient is there."""
    derivative: int
    """Saved beside it where the gradient of G is differentiated: Hessian products, unrolling."""

    def __str__(self) -> str:
        return (
            f"weights {spelled(self.weights)}, a lower gradient {spelled(self.graph)}, "
            f"its derivative {spelled(self.derivative)} more"
        )


def footprint(
    loss: Callable[[Params, Any], Tensor], frozen: Params, trained: Params, batch: Any
) -> Footprint:
    """Of `loss({**frozen, **trained}, batch)` and its gradient in `trained`.

    Tensors may lie anywhere; only their shapes and dtypes are looked at. Costs one forward and one
    backward without data.
    """
    fixed = tree.map(_without_data, frozen)
    variables = tree.map(lambda value: _without_data(value).requires_grad_(), trained)
    at, inputs = {**fixed, **variables}, tree.map_nested(_without_data, batch)
    own = [value.untyped_storage() for value in at.values()]
    known = [*own, *(t.untyped_storage() for t in _leaves(inputs))]
    with _saved(known) as graph:
        value = loss(at, inputs)
    with _saved([*known, *graph]) as derivative:
        torch.autograd.grad(value, list(variables.values()), create_graph=True, allow_unused=True)
    return Footprint(_bytes(own), _bytes(graph), _bytes(derivative))


def require_room(found: Footprint, device: torch.device, remedy: str) -> None:
    """Raises `RequirementError` where the weights and one lower gradient are more than there is."""
    room, needed = capacity(device), found.weights + found.graph
    if room is not None and needed > room:
        raise RequirementError(
            f"{device} has {spelled(room)}, and the run needs at least {spelled(needed)}: {found}; "
            f"{remedy}"
        )


def capacity(device: torch.device) -> int | None:
    """Bytes of memory of a device, used or not; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def spelled(size: int) -> str:
    """Bytes as a reader takes them in: 1.5 GiB, 640 MiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.3g} KiB"


def _without_data(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree.map_nested(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


@contextmanager
def _saved(known: Iterable[torch.UntypedStorage]) -> Iterator[list[torch.UntypedStorage]]:
    """The storages that autograd saves within, each once, without those `known`."""
    seen = {storage._cdata for storage in known}
    found: list[torch.UntypedStorage] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found.append(storage)  # held, so that its address is not taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _bytes(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
