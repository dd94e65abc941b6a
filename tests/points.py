"""Losses and points on plain functions."""


def halves(x, y, batch):
    a, b = y["a"], y["b"]
    return 0.5 * (a - x["x"]).square().sum() + 0.5 * (b - 2 * x["x"]).square().sum()


def product(x, y, batch):
    return (y["a"] * y["b"]).sum()
