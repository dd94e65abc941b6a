"""Optimizers and a small network to unroll through, and how to ask about it."""

import torch

from bilevel import hypergradient
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop

OPTIMIZERS = [
    SGD(lr=0.1, weight_decay=0.01),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.05, momentum=0.9, nesterov=True),
    Adam(lr=0.03, weight_decay=0.01),
    AdamW(lr=0.03),
    RMSprop(lr=0.02, momentum=0.5),
]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net:
    """A layer of tanh with weighted examples; `decay` is what a trace would freeze."""

    def __init__(self, decay=0.3):
        self.decay = decay

    def lower(self, x, y, batch):
        errors = ((batch["in"] @ y["w"] + y["b"]).tanh() - batch["out"]).square().sum(1)
        return (x["weight"][: len(errors)].sigmoid() * errors).mean() + self.decay * (
            y["w"].square().sum() * x["decay"]
        )

    def upper(self, x, y, batch):
        return ((batch["in"] @ y["w"] + y["b"]).tanh() - batch["out"]).square().mean()


X = {"weight": draw(6, seed=1), "decay": draw(seed=2).square()}
Y = {"w": draw(4, 3, seed=3), "b": draw(3, seed=4)}


def batch(size=6, seed=5):
    return {"in": draw(size, 4, seed=seed), "out": draw(size, 3, seed=seed + 1)}


def ask(net, memory, optimizer=None, given=None, steps=5, lower=None, x=X):
    return hypergradient(
        net.upper,
        lower or net.lower,
        x,
        Y,
        estimator=Unroll(
            along=Gradient(steps=steps, optimizer=optimizer or SGD(lr=0.1)), memory=memory
        ),
        upper_batch=batch(seed=9),
        lower_batch=batch() if given is None else given,
    )


def off(got, expected):
    pairs = [(got.hypergradient[n], e) for n, e in expected.hypergradient.items()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
