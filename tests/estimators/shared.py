"""Optimizers to unroll, and a loss that can be differentiated once."""

import torch

from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop

OPTIMIZERS = [
    SGD(lr=0.1),
    SGD(lr=0.05, momentum=0.9),
    SGD(lr=0.05, momentum=0.9, nesterov=True),
    Adam(lr=0.1),
    AdamW(lr=0.1, weight_decay=0.2),
    RMSprop(lr=0.05, momentum=0.3),
]


class OnceOnly(torch.autograd.Function):
    """A square whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return 2 * value * grad
