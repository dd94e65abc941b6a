"""Weights that are drawn lie on the simplex, and what is chosen of them is what the runs speak for."""

import numpy as np
import pytest

from bilevel.studying.file import After, Mixtures
from bilevel.studying.mixtures import chosen, points, predicted

NAMES = ("a", "b", "c", "d")


def mixtures(number):
    return Mixtures(over="problem.weights", names=NAMES, points=number)


def test_points_are_positive_with_sum_one_and_a_seeds_own():
    found = points(mixtures(300), 4)
    assert found.shape == (300, 4)
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_array_equal(found, points(mixtures(300), 4))
    assert not np.allclose(found, points(mixtures(300), 5))
    # of the flat Dirichlet distribution: mean 1/4, variance 3/80
    np.testing.assert_allclose(found.mean(0), 0.25, atol=4 * (3 / 80 / 300) ** 0.5)
    alone = points(mixtures("alone"), 4)
    assert (alone.argmax(1) == range(4)).all()
    assert (alone.max(1) > 0.999).all()


def test_the_best_and_the_top():
    losses = [3.0, 1.0, float("nan"), 2.0]
    best = chosen(After(arm="x", choose="best"), mixtures(4), 0, losses)
    np.testing.assert_array_equal(best, points(mixtures(4), 0)[1])
    top = chosen(After(arm="x", choose="top", top=2), mixtures("alone"), 0, losses)
    np.testing.assert_allclose(top, [0.0, 0.5, 0.0, 0.5], atol=1e-3)


@pytest.mark.parametrize("least", [(0.4, 0.3, 0.2, 0.1), (0.1, 0.1, 0.1, 0.7)])
def test_the_regression_finds_the_mixture_that_cancels(least):
    """A loss that is quadratic in the weights, from 40 noisy runs: nearer to its least than the best run."""
    generator, target = np.random.default_rng(0), np.array(least)
    tried = points(mixtures(40), 2)
    losses = ((tried - target) ** 2).sum(1) + 0.01 * generator.standard_normal(40)
    got = chosen(After(arm="x", choose="regression"), mixtures(40), 2, list(losses))
    assert got.sum() == pytest.approx(1)
    assert np.linalg.norm(got - target) < np.linalg.norm(tried[losses.argmin()] - target)
    noise = generator.permutation(losses)  # control: losses that say nothing of the weights
    other = chosen(After(arm="x", choose="regression"), mixtures(40), 2, list(noise))
    assert np.linalg.norm(other - target) > np.linalg.norm(got - target)


def test_the_prediction_is_kernel_ridge_regression_in_its_closed_form():
    tried = points(mixtures(12), 1)
    values, at = np.arange(12.0) ** 1.5, points(mixtures(5), 9)

    def kernel(left, right):
        return (1 + 2 * left @ right.T) ** 2

    solved = np.linalg.solve(kernel(tried, tried) + 0.01 * np.eye(12), values - values.mean())
    expected = kernel(at, tried) @ solved + values.mean()
    np.testing.assert_allclose(predicted(tried, values, at), expected, rtol=1e-8)
