"""Graphs that keep parts of variables where they would keep wholes, and gather them again when they need them.

What autograd saves of a whole that was gathered is replaced by this rank's part and where in the whole
it is (`torch.autograd.graph.saved_tensors_hooks`); a backward pass gathers it, and lets go of it. What
a loss makes of a whole, as a copy in another dtype, is no longer it and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bilevel.errors import ProblemError
from bilevel.ranks import Ranks


@dataclass(frozen=True)
class _Gathered:
    """A whole as it can be gathered again."""

    storage: StorageWeakRef
    gather: Callable[[], Sequence[Tensor]]
    part: Tensor
    version: int

    def again(self) -> Tensor:
        if self.part._version != self.version:
            raise ProblemError(
                "a part of a variable was written into between a loss and its derivative, which "
                "gathers it again (runtime.keep: again); have the component that did so make a new "
                "tensor, or set runtime.keep=whole"
            )
        (whole,) = self.gather()
        remember(whole, self.part, self.gather)
        return whole


_known: dict[int, _Gathered] = {}
"""By the address of their memory; those that are alive."""


def remember(whole: Tensor, part: Tensor, gather: Callable[[], Sequence[Tensor]]) -> None:
    """Note that `gather` makes this whole of this part."""
    for address in [at for at, known in _known.items() if known.storage.expired()]:
        del _known[address]
    storage = _memory(whole)
    if storage is not None:
        made = _Gathered(StorageWeakRef(storage), gather, part.detach(), part._version)
        _known[storage.data_ptr()] = made


def _memory(tensor: Tensor) -> Any:
    """Its storage; None for one without numbers, or that stands for others in a trace or a transform."""
    if type(tensor) is not Tensor or is_functorch_wrapped_tensor(tensor) or not tensor.numel():
        return None
    if tensor._is_zerotensor():  # a tangent that forward mode knows to be zero has no memory
        return None
    return tensor.untyped_storage()


def gathering_again(ranks: Ranks) -> AbstractContextManager[None]:
    """Within, graphs keep parts where `ranks` hold variables together and say so (`keep: again`)."""
    if ranks.team is None or ranks.team.keep != "again":
        return nullcontext()
    return _gathering()


@contextmanager
def _gathering() -> Iterator[None]:
    try:
        with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _known.clear()


def _packed(tensor: Tensor) -> Any:
    storage = _memory(tensor)
    known = None if storage is None else _known.get(storage.data_ptr())
    if known is None or known.storage.expired():
        return tensor
    return known, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpacked(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    known, size, stride, offset = kept
    return known.again().as_strided(size, stride, offset)
