"""Rows pass the language model a few at a time, and the loss is that of the whole batch.

A loss reads little of a row: its state at an end token, its answers' −log p. Those are computed chunk by
chunk, each chunk a checkpoint (`bilevel.calculus.checkpointed`), and the loss from them all. For InfoNCE
this is gradient caching (Gao et al., 2021, arXiv:2101.06983), left to autograd so that the gradient can be
differentiated again. One chunk's graph is held at a time; every chunk is computed once more a derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.calculus import checkpointed
from bilevel.types import Params
from bilevel.unrolling.nested import flat, rebuild

from .models.network import chunks

PerRow = Callable[[Params, dict[str, Any]], tuple[Tensor, ...]]
"""(parameters, rows) ↦ tensors with one entry a row, none of which depends on another row."""


def in_chunks(
    function: PerRow, parameters: Params, rows: dict[str, Any], size: int | None
) -> tuple[Tensor, ...]:
    """`function(parameters, rows)`, computed on `size` rows at a time; None: on all at once.

    `rows` are tensors in nested dicts, their first axis the row. `function` is differentiated in
    `parameters` alone, of which it should be given no more than it reads.
    """
    if size is None:
        return function(parameters, rows)

    def of(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = iter(tensors)
        own = rebuild(parameters, leaves)
        return function(own, rebuild(rows, leaves))

    weights, entries, once = flat(parameters), flat(rows), checkpointed(of)

    def at(part: slice) -> tuple[Tensor, ...]:
        return once(*weights, *(entry[part] for entry in entries))

    number = len(entries[0])
    parts = list(chunks(number, size))
    if entries[0].is_meta:  # shapes alone: one chunk stands for all that are as long
        whole, rest = divmod(number, size)
        found = [at(parts[0])] * whole if whole else []
        found += [at(parts[-1])] if rest else []
    else:
        found = [at(part) for part in parts]
    return tuple(torch.cat(columns) for columns in zip(*found, strict=True))
