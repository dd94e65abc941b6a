"""Small matrices of numbers, each function one operation of a step that is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.scalars.functions import call


def tensor_of(numbers: float | Sequence[Any]) -> Tensor:
    """A number, several or rows of them as a tensor in float64 on the CPU."""
    return call(_tensor, numbers)


def numbers_of(tensor: Tensor) -> list[Any]:
    """The numbers that a tensor holds, in lists (one synchronisation)."""
    return call(Tensor.tolist, tensor)


def least_squares(A: Tensor, b: Tensor) -> Tensor:
    """argmin ‖A x − b‖ for a vector b; of least norm where the rank of A is deficient."""
    return call(_least_squares, A, b)


def _tensor(numbers: float | Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _least_squares(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
