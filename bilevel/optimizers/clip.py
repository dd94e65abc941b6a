"""Gradient clipping, differentiable where a step that is clipped is differentiated."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.types import Params


@component
class Clip:
    """g · min(1, norm / ‖g‖), after each number was cut to ± value: what of g reaches the optimizer.

    ‖g‖ is over all entries together. As `torch.nn.utils.clip_grad_norm_`, but for the 1e-6 that torch
    adds to ‖g‖, and `clip_grad_value_`. Where a step is differentiated, so is this: a number that was
    cut passes nothing on, and a long g passes on what is across to it.
    """

    norm: PositiveFloat | None = None
    value: PositiveFloat | None = None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.norm is None and self.value is None:
            raise ValueError("needs norm, value, or both; leave clip out for none")
        return self

    def apply(self, gradient: Params) -> Params:
        """The gradient as the optimizer is given it."""
        if (most := self.value) is not None:
            gradient = tree.map(lambda entry: entry.clamp(-most, most), gradient)
        if self.norm is None or not gradient:
            return gradient
        square = tree.summed(tree.map(lambda entry: _wide(entry).square(), gradient))
        is_long = square > self.norm**2
        # the root is taken where it is used alone: at g = 0 its derivative is infinite
        factor = torch.where(is_long, self.norm * torch.where(is_long, square, 1.0).rsqrt(), 1.0)
        return tree.map(lambda entry: entry * factor.to(entry.device, entry.dtype), gradient)


def _wide(entry: Tensor) -> Tensor:
    """In float64, where squares of float32 numbers neither overflow nor vanish, if the device has it."""
    return entry.float() if entry.device.type == "mps" else entry.double()
