"""Optimizer steps that autograd can differentiate: SGD, Adam, AdamW, RMSprop.

Each equals its torch.optim namesake to rounding. Out of place, pure in (y, gradient, state), with
the state a dict of trees, so a step can be replayed and differentiated (unrolling). Where an option
is `Learned`, it is bound before a step is taken (`bilevel.optimizers.learned.bound`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.optimizers.learned import Learned
from bilevel.types import Params


@component
class SGD:
    """y − lr · d, with d the gradient or its (Nesterov) momentum average; as `torch.optim.SGD`."""

    differentiable: ClassVar[bool] = True
    affine: ClassVar[bool] = True
    """The step is affine in (y, gradient, state): its derivative does not depend on them."""
    lr: PositiveFloat | Learned = 0.1
    momentum: NonNegativeFloat | Learned = 0.0
    dampening: NonNegativeFloat = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat | Learned = 0.0

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
        d = _plus(gradient, self.weight_decay, y)
        if self.momentum != 0:
            # torch starts the average at the first gradient, undampened
            buffer = (
                _plus(_scale(self.momentum, state["momentum"]), 1 - self.dampening, d)
                if state
                else d
            )
            state = {"momentum": buffer}
            d = _plus(d, self.momentum, buffer) if self.nesterov else buffer
        return _minus(y, self.lr, d), state


@component
class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), with L2 `weight_decay`; as `torch.optim.Adam`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat | Learned = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] | Learned = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] | Learned = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat | Learned = 0.0

    def init(self, y: Params) -> dict[str, Any]:
        return _adam_init(y)

    def step(self, y: Params, gradient: Params, state: dict[str, Any]) -> tuple[Params, Any]:
        d, state = _adam_direction(self, _plus(gradient, self.weight_decay, y), state)
        return _minus(y, self.lr, d), state


@component
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101); as `torch.optim.AdamW`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat | Learned = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] | Learned = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] | Learned = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat | Learned = 1e-2

    def init(self, y: Params) -> dict[str, Any]:
        return _adam_init(y)

    def step(self, y: Params, gradient: Params, state: dict[str, Any]) -> tuple[Params, Any]:
        d, state = _adam_direction(self, gradient, state)
        kept = _option(lambda lr, decay: 1 - lr * decay, self.lr, self.weight_decay)
        return _minus(_scale(kept, y), self.lr, d), state


@component
class RMSprop:
    """RMSprop (Tieleman and Hinton 2012), uncentred; as `torch.optim.RMSprop`."""

    differentiable: ClassVar[bool] = True
    lr: PositiveFloat | Learned = 1e-2
    alpha: Annotated[float, Field(ge=0, lt=1)] | Learned = 0.99
    eps: PositiveFloat = 1e-8
    momentum: NonNegativeFloat | Learned = 0.0
    weight_decay: NonNegativeFloat | Learned = 0.0

    def init(self, y: Params) -> dict[str, Params]:
        return {"square": tree.zeros_like(y), "momentum": tree.zeros_like(y)}

    def step(
        self, y: Params, gradient: Params, state: dict[str, Params]
    ) -> tuple[Params, dict[str, Params]]:
        g = _plus(gradient, self.weight_decay, y)
        square = _average(self.alpha, state["square"], tree.mul(g, g))
        d = tree.div(g, _root(square, self.eps))
        momentum = tree.add(_scale(self.momentum, state["momentum"]), d)
        return _minus(y, self.lr, momentum), {"square": square, "momentum": momentum}


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
    corrected = _scale(_correction(options.beta2, count), square)
    d = tree.div(mean, _root(corrected, options.eps))
    direction = _scale(_correction(options.beta1, count), d)
    return direction, {"step": step, "mean": mean, "square": square}


def _correction(beta: Value, count: Tensor) -> Value:
    """What makes an average that began at 0 one of weights that sum to 1."""
    # torch's names: the same of a number and a tensor by operators costs twice as much
    return _option(lambda number: torch.pow(number, count).neg().add(1).reciprocal(), beta)


def _average(beta: Value, old: Params, new: Params) -> Params:
    return _plus(_scale(beta, old), _option(lambda number: 1 - number, beta), new)


Value = float | Tensor | Params | Learned
"""An option of an optimizer: one number for all of y, or one for each entry, as `bound` leaves it."""


def _option(function: Callable[..., Any], *options: Value) -> Value:
    """function of options, entry by entry where one of them is a tree."""
    known = [option if isinstance(option, float) else _known(option) for option in options]
    names = next((option for option in known if isinstance(option, dict)), None)
    if names is None:
        return function(*known)
    rows = {n: [o[n] if isinstance(o, dict) else o for o in known] for n in names}
    return {name: function(*row) for name, row in rows.items()}


def _plus(y: Params, option: Value, d: Params) -> Params:
    """y + option · d."""
    if isinstance(option, float):
        return tree.axpy(option, d, y)
    option = _known(option)
    if isinstance(option, dict):
        return {n: (entry + option[n] * d[n]).to(entry.dtype) for n, entry in y.items()}
    return tree.axpy(float(option), d, y)


def _minus(y: Params, option: Value, d: Params) -> Params:
    if isinstance(option, float):
        return tree.axpy(-option, d, y)
    return _plus(y, _option(lambda number: -number, option), d)


def _scale(option: Value, values: Params) -> Params:
    """option · values, in their dtype: torch takes that of a wider option for scalars alone."""
    option = _known(option)
    if isinstance(option, dict):
        return {n: (option[n] * entry).to(entry.dtype) for n, entry in values.items()}
    if isinstance(option, Tensor):
        return tree.map(lambda entry: (entry * option).to(entry.dtype), values)
    return tree.scale(option, values)


def _known(option: Value) -> float | Tensor | Params:
    if isinstance(option, Learned):
        raise ProblemError(
            f"an optimizer's option is {option}, and this step is not one of the lower solve that "
            "takes options from x: that is lower: gradient; give a number here"
        )
    return option


def _root(square: Params, eps: float) -> Params:
    return tree.map(lambda s: _safe_root(s) + eps, square)


def _safe_root(square: Tensor) -> Tensor:
    """√square with derivative 0 where it is 0, so that 0 / 0 never makes a NaN.

    A coordinate whose gradients were all zero has the step g / eps, whose derivative 1 / eps is
    what remains when the root contributes nothing.
    """
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
