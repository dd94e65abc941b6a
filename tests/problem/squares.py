"""A lower level of squares at one point, and a hypergradient of any lower loss there."""

import torch

import bilevel
from bilevel.estimators.implicit import Implicit
from bilevel.lower.gradient import Gradient
from bilevel.types import Counts, Loss

X = {"x": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}
Y = {"y": torch.tensor([0.3, 0.0, -1.2], dtype=torch.float64)}


def square(x, y, batch):
    return (y["y"] - x["x"]).square().sum()


def upper(x, y, batch):
    return y["y"].sum()


def lower_of(function, batch=None):
    return Loss(function, batch, Counts(), "lower")


def estimate(lower, estimator=None, y=None, x=None):
    x = x or X
    solved = bilevel.solve_lower(lower, x, y or Y, solver=Gradient(steps=40), record=True)
    return bilevel.hypergradient(upper, lower, x, solved, estimator=estimator or Implicit())
