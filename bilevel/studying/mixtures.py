"""Weights that are tried before an arm begins: drawn from a simplex, and chosen by what short runs with them came to.

`regression` is as in RegMix (Liu et al., 2024, arXiv:2407.01492): a regression of the loss on the weights, and
the mean of the hundred mixtures that it finds best among many that are drawn; with kernel ridge regression of a
quadratic kernel in the place of boosted trees, as there are tens of runs and not hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.studying.file import After, Mixtures

DRAWN, AVERAGED = 10_000, 100
RIDGE = 1e-2
"""Beside a kernel that is of the size of 1 between two mixtures."""

Weights = NDArray[np.float64]


def points(mixtures: Mixtures, seed: int) -> Weights:
    """[point, name], each row positive with sum 1; those of a seed are always the same ones."""
    size = len(mixtures.names)
    if mixtures.points == "alone":
        weights = np.full((size, size), mixtures.least)
        np.fill_diagonal(weights, 1.0)
    else:
        weights = np.random.default_rng([seed, size]).dirichlet(np.ones(size), mixtures.points)
        weights = np.maximum(weights, mixtures.least)
    return weights / weights.sum(1, keepdims=True)


def chosen(after: After, mixtures: Mixtures, seed: int, values: Sequence[float]) -> Weights:
    """[name]: the weights that the runs at `points` speak for, of which each came to one of `values`, the least best.

    A run that failed is NaN and speaks for nothing.
    """
    weights, found = points(mixtures, seed), np.array(values)
    alive = np.isfinite(found)
    weights, found = weights[alive], found[alive]
    if after.choose == "best":
        return weights[found.argmin()]
    if after.choose == "top":
        best = weights[np.argsort(found, kind="stable")[: after.top]]
        made = np.full(len(mixtures.names), mixtures.least)
        made[best.argmax(1)] = 1.0
        return made / made.sum()
    drawn = np.random.default_rng([seed, 1]).dirichlet(np.ones(weights.shape[1]), DRAWN)
    best = np.argsort(predicted(weights, found, drawn), kind="stable")[:AVERAGED]
    return drawn[best].mean(0)


def predicted(weights: Weights, values: Weights, at: Weights) -> Weights:
    """Kernel ridge regression of the centred values with k(u, v) = (1 + √S uᵀv)², S how many names there are."""
    from sklearn.kernel_ridge import KernelRidge

    gamma, centre = math.sqrt(weights.shape[1]), values.mean()
    model = KernelRidge(kernel="poly", degree=2, gamma=gamma, coef0=1).set_params(alpha=RIDGE)
    return model.fit(weights, values - centre).predict(at) + centre
