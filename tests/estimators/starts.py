"""Losses whose lower level starts at x, tasks, and unrolling by hand."""

import itertools

import torch

from bilevel import hypergradient, solve_lower
from bilevel.components import component
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import stream
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper

K, LR = 5, 0.1


def draw(*shape):
    return torch.randn(*shape, generator=stream(0, f"meta {shape}"), dtype=torch.float64)


X = {"w": draw(4), "scale": 1 + 0.1 * draw(4)}
BATCH = {"a": draw(7, 4), "b": draw(7)}


def fit(y):
    return (torch.tanh(BATCH["a"] @ y) - BATCH["b"]).square().mean()


def lower(x, y, batch):
    """Not quadratic, so that the Hessian changes along the path; x enters beside the start."""
    return fit(y["w"]) + 0.1 * (x["scale"] * y["w"].square()).sum()


def upper(x, y, batch):
    return (y["w"] - 1).pow(4).sum() + (x["w"] * y["w"]).sum()


STARTS = {
    "x itself": lambda x: {"w": x["w"]},
    "a function of x": lambda x: {"w": torch.sin(x["w"]) * x["scale"]},
    "one that x has no part in": lambda x: {"w": torch.ones(4, dtype=torch.float64)},
}


def solved(restart, steps=K, optimizer=None):
    solver = Gradient(steps=steps, optimizer=optimizer or SGD(lr=LR))
    return solve_lower(lower, X, restart, solver=solver, record=True)


def ask(estimator, solution, x=X):
    return hypergradient(upper, lower, x, solution, estimator=estimator)


def setup(problem, estimator=None, steps=K):
    return Setup(
        problem,
        Gradient(steps=steps, optimizer=SGD(lr=LR)),
        Upper(steps=2, optimizer=SGD(lr=0.1)),
        estimator or Unroll(),
        dtype=torch.float64,
    )


@component
class Sine:
    """The numerical example of Liu et al. (2021), arXiv:2110.00455, with n = 1, a = 2, c = 2.

    min (x − a)² + (y − a − c)² over y ∈ argmin sin(x + y − c): y = C + c − x for C = −π/2 + 2πk,
    so that F = (x − a)² + (C − x − a)², least at x = C / 2 with (C − 2a)² / 2; best is C = 3π/2.
    """

    def init(self, streams):
        x = torch.full((1,), -6.0, dtype=torch.float64)
        return {"x": x}, {"y": torch.zeros(1, dtype=torch.float64)}

    def upper_loss(self, x, y, batch):
        return ((x["x"] - 2).square() + (y["y"] - 4).square()).sum()

    def lower_loss(self, x, y, batch):
        return torch.sin(x["x"] + y["y"] - 2).sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    def lower_batches(self, stream):
        return itertools.repeat(None)

    def project_lower(self, y):
        return {"y": y["y"].clamp(-10, 10)}
