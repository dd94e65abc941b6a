"""Tensors in nested dicts, such as the state of an optimizer, as a list and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def flat(state: Any) -> list[Tensor]:
    """The tensors of a nested dict, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for part in state.values() for leaf in flat(part)]


def rebuild(state: Any, leaves: Iterator[Tensor]) -> Any:
    """`state` with its tensors replaced, in the order of `flat`."""
    if isinstance(state, Tensor):
        return next(leaves)
    return {key: rebuild(part, leaves) for key, part in state.items()}


def zeros(state: Any) -> Any:
    """Zeros in the structure of a nested dict."""
    return rebuild(state, iter([torch.zeros_like(leaf) for leaf in flat(state)]))
