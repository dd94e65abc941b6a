"""A point and a function of several operations, for steps that are recorded."""

import torch

X = torch.linspace(0.1, 1, 3, dtype=torch.float64)


def long(x):
    return ((x.sin() + 1).exp() - x).cos()
