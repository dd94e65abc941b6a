"""The two tasks that libraries are measured on; torch and nothing else, so that any of them can.

Both weigh the examples of a training batch (hyper-cleaning): x holds a logit an example, G is the
weighted cross-entropy, F the plain one on another batch. F does not depend on x directly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A bilevel problem at one point, as plain functions and as a module."""

    y: Params
    x: Params
    train: Batch
    held_out: Batch
    net: nn.Module
    work: int
    """Hessian products of a linear solve, or lower steps to unroll."""
    decay: float = 0.0
    lr: float = 0.1
    momentum: float = 0.0

    def lower(self, x: Params, y: Params, batch: Batch) -> Tensor:
        """G: weighted cross-entropy + decay / 2 · ‖y‖²."""
        logits = self.net.compute(y, batch[0])  # pyright: ignore[reportCallIssue]
        each = cross_entropy(logits.transpose(1, -1), batch[1], reduction="none")
        loss = (x["logits"].sigmoid() * each.reshape(len(each), -1).mean(1)).mean()
        if self.decay:
            squares = torch.stack([entry.square().sum() for entry in y.values()])
            loss = loss + 0.5 * self.decay * squares.sum()
        return loss

    def upper(self, x: Params, y: Params, batch: Batch) -> Tensor:
        """F: cross-entropy."""
        logits = self.net.compute(y, batch[0])  # pyright: ignore[reportCallIssue]
        return cross_entropy(logits.transpose(1, -1), batch[1])

    def to(self, dtype: torch.dtype) -> Task:
        """The same in another precision."""

        def moved(tensors: Params) -> Params:
            return {name: entry.to(dtype) for name, entry in tensors.items()}

        floats = [
            (inputs.to(dtype) if inputs.is_floating_point() else inputs, labels)
            for inputs, labels in (self.train, self.held_out)
        ]
        train, held_out = floats
        y, x = moved(self.y), moved(self.x)
        return replace(self, y=y, x=x, train=train, held_out=held_out)

    def shorter(self) -> Task:
        """The same with one product or step less."""
        return replace(self, work=self.work - 1)

    def module(self) -> Module:
        """y as an `nn.Module`, for libraries that want one."""
        return Module(self)


class Module(nn.Module):
    """The parameters of a task; `as_dict` reads them as attributes, which `higher` can patch."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.names = list(task.y)
        for name, entry in task.y.items():
            setattr(self, name, nn.Parameter(entry.detach().clone()))

    def as_dict(self) -> Params:
        return {name: getattr(self, name) for name in self.names}

    def forward(self) -> Params:
        """The parameters: the losses are functions of them."""
        return self.as_dict()


class MLP(nn.Module):
    """Tanh layers; holds no parameters, `compute` takes them."""

    def compute(self, y: Params, inputs: Tensor) -> Tensor:
        depth = len(y) // 2
        for k in range(depth):
            inputs = linear(inputs, y[f"w{k}"], y[f"b{k}"])
            inputs = inputs.tanh() if k < depth - 1 else inputs
        return inputs


class Transformer(nn.Module):
    """Pre-norm encoder with four heads and attention written out: it has second derivatives."""

    def compute(self, y: Params, inputs: Tensor) -> Tensor:
        h = y["embed"][inputs] + y["place"]
        for k in range(sum(name.startswith("qkv") for name in y)):
            h = h + self._attention(y, k, layer_norm(h, h.shape[-1:]))
            wide = gelu(linear(layer_norm(h, h.shape[-1:]), y[f"up{k}"]))
            h = h + linear(wide, y[f"down{k}"])
        return linear(layer_norm(h, h.shape[-1:]), y["head"])

    def _attention(self, y: Params, k: int, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        parts = linear(h, y[f"qkv{k}"]).view(batch, length, 3, 4, width // 4)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(width // 4)).softmax(-1)
        return linear((weights @ value).transpose(1, 2).reshape(h.shape), y[f"out{k}"])


def mlp(toy: bool = False, lr: float = 0.1, momentum: float = 0.0) -> Task:
    """Unrolling: 50 SGD steps of an MLP with 238,602 parameters, 900 examples a batch."""
    widths, size, steps = ([5, 8, 3], 6, 4) if toy else ([150, 256, 256, 256, 256, 10], 900, 50)
    draw = torch.Generator().manual_seed(0)
    y: Params = {}
    for k, (inside, outside) in enumerate(itertools.pairwise(widths)):
        y[f"w{k}"] = torch.randn(outside, inside, generator=draw) / math.sqrt(inside)
        y[f"b{k}"] = 0.1 * torch.randn(outside, generator=draw)
    batches = [
        (
            torch.randn(size, widths[0], generator=draw),
            torch.randint(widths[-1], (size,), generator=draw),
        )
        for _ in range(2)
    ]
    x = {"logits": torch.randn(size, generator=draw)}
    return Task(y, x, *batches, MLP(), steps, lr=lr, momentum=momentum)


def transformer(toy: bool = False, size: int = 4) -> Task:
    """Implicit differentiation: 10 products, a transformer with 5.05 million parameters.

    The decay makes the Hessian positive definite, as conjugate gradient needs.
    """
    width, depth, vocabulary, length = (8, 1, 7, 3) if toy else (256, 6, 640, 32)
    draw = torch.Generator().manual_seed(0)
    shapes = {"embed": (vocabulary, width), "place": (length, width), "head": (vocabulary, width)}
    for k in range(depth):
        shapes |= {f"qkv{k}": (3 * width, width), f"out{k}": (width, width)}
        shapes |= {f"up{k}": (4 * width, width), f"down{k}": (width, 4 * width)}
    gains = {"embed": math.sqrt(width), "place": math.sqrt(width), "head": 0.1}
    y = {
        name: gains.get(name, 1.0) * torch.randn(shape, generator=draw) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }
    batches = [
        (
            torch.randint(vocabulary, (size, length), generator=draw),
            torch.randint(vocabulary, (size, length), generator=draw),
        )
        for _ in range(2)
    ]
    x = {"logits": torch.randn(size, generator=draw)}
    return Task(y, x, *batches, Transformer(), 4 if toy else 10, decay=3.0)


TASKS = {
    "cg": transformer,
    "cg, larger batch": partial(transformer, size=16),
    "neumann": transformer,
    "unroll": mlp,
    "unroll, momentum": partial(mlp, lr=0.01, momentum=0.9),
}


def kind(name: str) -> str:
    """What a task asks for, its size apart: a key of METHODS."""
    return name.split(",")[0]


SCALE = 0.1
"""The step of the Neumann series: below 2 / largest eigenvalue of the transformer's Hessian."""
EPSILON = 0.1
"""Of the finite difference of one step: y is moved by this along ∇y F, either way."""
