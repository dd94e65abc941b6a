"""Set-ups to run."""

import itertools
from dataclasses import dataclass

import torch

from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.rng import stream
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.quadratic import Quadratic


@dataclass(frozen=True)
class Noisy:
    """A stochastic problem in the fewest lines: shuffled epochs, kept by a plain generator."""

    def init(self, streams):
        y = torch.randn(3, generator=streams["init"])
        return {"log_penalty": torch.zeros(3)}, {"w": y}

    def upper_loss(self, x, y, batch):
        return ((batch @ y["w"] - 1) ** 2).mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + (x["log_penalty"].exp() * y["w"] ** 2).sum()

    def upper_batches(self, generator):
        while True:
            yield torch.randn(5, 3, generator=generator)

    def lower_batches(self, generator):
        data = torch.randn(20, 3, generator=stream(0, "data"))
        while True:  # shuffled epochs: the position within one is not in the generator
            for rows in torch.randperm(20, generator=generator).split(6):
                yield data[rows]


def setup(problem=None, estimator=None, steps=6, **options):
    return Setup(
        problem or Quadratic(),
        options.pop("lower", Gradient(steps=5, optimizer=SGD(lr=0.3, momentum=0.5))),
        Upper(steps=steps, optimizer=options.pop("optimizer", Adam(lr=0.05))),
        estimator or Implicit(solver=CG(iterations=4)),
        dtype=options.pop("dtype", torch.float64),
        **options,
    )


def same(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


def frozen(saved):
    """A deep copy, as a checkpoint on disk is."""
    if isinstance(saved, torch.Tensor):
        return saved.clone()
    if isinstance(saved, dict):
        return {key: frozen(value) for key, value in saved.items()}
    return saved


class Plain:
    """F = (y − 1)², G = (y − x)²: one SGD step of lr 1/2 solves G, and dΦ/dx = 2 (x − 1)."""

    def init(self, streams):
        return {"x": torch.tensor(3.0)}, {"y": torch.tensor(0.0)}

    def upper_loss(self, x, y, batch):
        return (y["y"] - 1) ** 2

    def lower_loss(self, x, y, batch):
        return (y["y"] - x["x"]) ** 2

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


EXACT = {"lower": Gradient(steps=1, optimizer=SGD(lr=0.5)), "upper": SGD(lr=0.25)}
