"""What a run will hold, counted before it is taken: on the meta device, where tensors have no data.

A step that is small is counted with data, which is faster: shape functions are Python, 0.5 ms each.

Counted are the weights and the tensors that autograd saves, each storage once, at the moment when most
are held: while ∇y G is computed, and while it is differentiated once more. Chunks that are computed again
in a backward (`micro_batches`) are seen as they come and go. It is a lower bound: temporaries, gradients,
optimizer states and the batch are not in it.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import tree
from bilevel.errors import RequirementError
from bilevel.events import Warned
from bilevel.types import Params

GIB = 2**30
SHARE = 0.75
"""Of a device's memory, for what is counted; the rest is for temporaries, gradients, optimizer states."""


@dataclass(frozen=True)
class Footprint:
    """Bytes."""

    weights: int
    graph: int
    """Saved at most at once while the gradient of G is computed."""
    derivative: int
    """Saved beside it while the gradient is differentiated: a Hessian product, a step unrolled."""
    kept: int = 0
    """Of these, what stays when the gradient is there: a path of K steps, stored, holds K times that."""

    @property
    def of_second_order(self) -> int:
        """All of it, where one step's gradient is differentiated."""
        return self.weights + self.graph + self.derivative

    def __str__(self) -> str:
        return (
            f"weights {spelled(self.weights)}, a lower gradient {spelled(self.graph)}, "
            f"its derivative {spelled(self.derivative)} more, of which a stored step keeps "
            f"{spelled(self.kept)}"
        )


def footprint(
    loss: Callable[[Params, Any], Tensor],
    frozen: Params,
    trained: Params,
    batch: Any,
    *,
    on: str = "meta",
    checkpoints: bool = True,
) -> Footprint:
    """Of `loss({**frozen, **trained}, batch)`, its gradient in `trained` and a Hessian product.

    Tensors may lie anywhere; on "meta" only their shapes and dtypes are looked at, on "cpu" a copy
    of them is computed with. Costs a forward, a backward and one through it; a forward and a backward
    more where the loss has `checkpoints`, whose graphs come while a gradient is computed.
    """

    def placed(value: Any) -> Any:
        return value.detach().to(on, copy=True) if isinstance(value, Tensor) else value

    fixed = tree.map(placed, frozen)
    variables = tree.map(lambda value: placed(value).requires_grad_(), trained)
    at, inputs = {**fixed, **variables}, tree.map_nested(placed, batch)
    own = [value.untyped_storage() for value in at.values()]
    meter = _Meter([*own, *(t.untyped_storage() for t in _leaves(inputs))])
    entries = list(variables.values())
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
        if checkpoints:
            torch.autograd.grad(loss(at, inputs), entries, allow_unused=True)
        value = loss(at, inputs)
        graph = meter.most
        found = torch.autograd.grad(value, entries, create_graph=True, allow_unused=True)
        kept = meter.now
        slopes = [slope for slope in found if slope is not None and slope.requires_grad]
        if slopes:
            like = [torch.zeros_like(slope) for slope in slopes]
            torch.autograd.grad(slopes, entries, like, allow_unused=True)
    size = sum({storage._cdata: storage.nbytes() for storage in own}.values())
    return Footprint(size, graph, meter.most - graph, kept)


def require_room(found: Footprint, device: torch.device, remedy: str) -> None:
    """Raises `RequirementError` where the weights and one lower gradient are more than there is."""
    room, needed = capacity(device), found.weights + found.graph
    if room is not None and needed > room:
        raise RequirementError(
            f"{device} has {spelled(room)}, and the run needs at least {spelled(needed)}: {found}; "
            f"{remedy}"
        )


def second_order_room(found: Footprint, device: torch.device, remedy: str) -> list[Warned]:
    """A warning where the gradient fits and its derivative beside it does not: not every method takes it."""
    room, needed = capacity(device), found.of_second_order
    if room is None or needed <= room:
        return []
    said = (
        f"{device} has {spelled(room)}, and a method that differentiates ∇y G (implicit, one_step, "
        f"unroll, …) needs at least {spelled(needed)}: {found}; {remedy}, or take a method without "
        "second derivatives (alternating, penalty)"
    )
    return [Warned(0, "memory", said)]


def capacity(device: torch.device) -> int | None:
    """Bytes of memory of a device, used or not; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def rows_at_a_time(each: int, held: int, device: torch.device, most: int) -> int:
    """How many rows of `each` bytes there is memory for beside `held`: 1 to `most`."""
    room = capacity(device)
    if room is None:
        return most
    return max(1, min(most, int((SHARE * room - held) // max(each, 1))))


def working_set(function: Callable[[], Any]) -> tuple[Any, int]:
    """(what `function` returns, the most bytes that tensors made within held at once), on any device.

    By its storages, as each is made and freed: temporaries within an operation are not seen.
    """
    alive = _Alive()
    with alive:
        found = function()
    return found, alive.most


def nbytes(parameters: Iterable[Tensor]) -> int:
    """Of all of them."""
    return sum(value.nbytes for value in parameters)


def spelled(size: int) -> str:
    """Bytes as a reader takes them in: 1.5 GiB, 640 MiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.3g} KiB"


def _leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree.map_nested(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._there = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in _leaves([args, kwargs])}
        for leaf in _leaves(found):
            storage = leaf.untyped_storage()
            if storage._cdata not in given | self._there:
                self._there.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return found

    def _freed(self, storage: int, size: int) -> None:
        self._there.remove(storage)
        self.now -= size


class _Meter:
    """Bytes that autograd holds, each storage once, without those `known`: now, and at most so far."""

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        self._known = {storage._cdata for storage in known}
        self._holders: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> _Held | Tensor:
        return tensor if tensor.untyped_storage()._cdata in self._known else _Held(self, tensor)

    def unpack(self, held: _Held | Tensor) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def add(self, storage: torch.UntypedStorage, holders: int) -> None:
        """One holder more, or less; the storage counts while it has any."""
        before = self._holders[storage._cdata]
        self._holders[storage._cdata] += holders
        if 0 in (before, before + holders):
            self.now += holders * storage.nbytes()
            self.most = max(self.most, self.now)


class _Held:
    """A saved tensor, until autograd lets it go."""

    def __init__(self, meter: _Meter, tensor: Tensor) -> None:
        self.tensor, self._meter = tensor, meter
        meter.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._meter.add(self.tensor.untyped_storage(), -1)
