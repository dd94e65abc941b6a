"""Optimizer steps that autograd can differentiate: SGD, Adam, AdamW, RMSprop.

Each equals its torch.optim namesake to rounding. Out of place, pure in (y, gradient, state), with
the state a dict of trees, so a step can be replayed and differentiated (unrolling).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.types import Params


@component
class SGD:
    """y − lr · d, with d the gradient or its (Nesterov) momentum average; as `torch.optim.SGD`."""

    differentiable: ClassVar[bool] = True
    affine: ClassVar[bool] = True
    """The step is affine in (y, gradient, state): its derivative does not depend on them."""
    lr: PositiveFloat = 0.1
    momentum: NonNegativeFloat = 0.0
    dampening: NonNegativeFloat = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        return self

    def init(self, y: Params) -> dict[str, Params]:
        return {}

    def step(
        self, y: Params, gradient: Params, state: dict[str, Params]
    ) -> tuple[Params, dict[str, Params]]:
        d = tree.axpy(self.weight_decay, y, gradient)
        if self.momentum:
            # torch starts the average at the first gradient, undampened
            buffer = (
                tree.axpy(1 - self.dampening, d, tree.scale(self.momentum, state["momentum"]))
                if state
                else d
            )
            state = {"momentum": buffer}
            d = tree.axpy(self.momentum, buffer, d) if self.nesterov else buffer
        return tree.axpy(-self.lr, d, y), state


@component
class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), with L2 `weight_decay`; as `torch.optim.Adam`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat = 1e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0

    def init(self, y: Params) -> dict[str, Any]:
        return _adam_init(y)

    def step(self, y: Params, gradient: Params, state: dict[str, Any]) -> tuple[Params, Any]:
        d, state = _adam_direction(self, tree.axpy(self.weight_decay, y, gradient), state)
        return tree.axpy(-self.lr, d, y), state


@component
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101); as `torch.optim.AdamW`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat = 1e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-2

    def init(self, y: Params) -> dict[str, Any]:
        return _adam_init(y)

    def step(self, y: Params, gradient: Params, state: dict[str, Any]) -> tuple[Params, Any]:
        d, state = _adam_direction(self, gradient, state)
        return tree.axpy(-self.lr, d, tree.scale(1 - self.lr * self.weight_decay, y)), state


@component
class RMSprop:
    """RMSprop (Tieleman and Hinton 2012), uncentred; as `torch.optim.RMSprop`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat = 1e-2
    alpha: float = Field(default=0.99, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    momentum: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0

    def init(self, y: Params) -> dict[str, Params]:
        return {"square": tree.zeros_like(y), "momentum": tree.zeros_like(y)}

    def step(
        self, y: Params, gradient: Params, state: dict[str, Params]
    ) -> tuple[Params, dict[str, Params]]:
        g = tree.axpy(self.weight_decay, y, gradient)
        square = _average(self.alpha, state["square"], tree.mul(g, g))
        d = tree.div(g, _root(square, self.eps))
        momentum = tree.axpy(1.0, d, tree.scale(self.momentum, state["momentum"]))
        return tree.axpy(-self.lr, momentum, y), {"square": square, "momentum": momentum}


def _adam_init(y: Params) -> dict[str, Any]:
    return {"step": torch.zeros(()), "mean": tree.zeros_like(y), "square": tree.zeros_like(y)}


def _adam_direction(
    options: Adam | AdamW, g: Params, state: dict[str, Any]
) -> tuple[Params, dict[str, Any]]:
    """m̂ / (√v̂ + eps) with bias-corrected averages of g and g²."""
    step = state["step"] + 1
    mean = _average(options.beta1, state["mean"], g)
    square = _average(options.beta2, state["square"], tree.mul(g, g))
    count = step.detach().double()  # as a tensor: a trace must not freeze it
    corrected = _times(1 / (1 - options.beta2**count), square)
    d = tree.div(mean, _root(corrected, options.eps))
    direction = _times(1 / (1 - options.beta1**count), d)
    return direction, {"step": step, "mean": mean, "square": square}


def _average(beta: float, old: Params, new: Params) -> Params:
    return tree.axpy(1 - beta, new, tree.scale(beta, old))


def _times(factor: Tensor, values: Params) -> Params:
    return tree.map(lambda entry: entry * factor, values)


def _root(square: Params, eps: float) -> Params:
    return tree.map(lambda s: _safe_root(s) + eps, square)


def _safe_root(square: Tensor) -> Tensor:
    """√square with derivative 0 where it is 0, so that 0 / 0 never makes a NaN.

    A coordinate whose gradients were all zero has the step g / eps, whose derivative 1 / eps is
    what remains when the root contributes nothing.
    """
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
