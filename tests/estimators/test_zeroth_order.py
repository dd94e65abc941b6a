"""Differences of values: unbiased, repeatable, and the gradient of what they claim."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.estimators.forward import Forward
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.testing import check_estimator
from bilevel.types import LowerSolution
from tests.cases import PROBLEMS, closed_form, offset, relative


def mean_and_error(case, estimator, path, calls):
    state, draws = None, []
    for _ in range(calls):
        estimate = case.estimate(estimator, LowerSolution(case.y, path=path), state=state)
        state = estimate.state
        draws.append(tree.flatten(estimate.hypergradient))
    draws = torch.stack(draws)
    return draws.mean(0), draws.std(0) / math.sqrt(calls)


@pytest.mark.parametrize(
    "estimator",
    [Forward(directions=3), ZerothOrder(samples=3), ZerothOrder(samples=3, partial=True)],
    ids=repr,
)
def test_random_directions_are_unbiased(estimator):
    """Within four standard errors of the derivative of the path; P is quadratic, so smoothing adds nothing."""
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(5, 0.3, offset(case.y, 1.0)).path
    truth = tree.flatten(case.estimate(Unroll(), LowerSolution(case.y, path=path)).hypergradient)
    mean, error = mean_and_error(case, estimator, path, 150)
    assert bool(((mean - truth).abs() <= 4 * error + 1e-6 * truth.abs()).all())
    assert not bool(((mean - 1.5 * truth).abs() <= 4 * error).all())  # control


def test_partial_differences_have_less_variance():
    case = closed_form(PROBLEMS[3], 0)  # ρ = 5: ∇x F is large
    path = case.record(5, 0.3, offset(case.y, 1.0)).path
    _, whole = mean_and_error(case, ZerothOrder(samples=2), path, 100)
    _, partial = mean_and_error(case, ZerothOrder(samples=2, partial=True), path, 100)
    assert float(partial.norm()) < 0.9 * float(whole.norm())


def test_draws_differ_from_call_to_call_and_repeat_from_the_same_state():
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(3, 0.3, case.y).path
    estimator = Forward(directions=1)
    first = case.estimate(estimator, LowerSolution(case.y, path=path))
    second = case.estimate(estimator, LowerSolution(case.y, path=path), state=first.state)
    again = case.estimate(estimator, LowerSolution(case.y, path=path), state=first.state)
    assert relative(second.hypergradient, first.hypergradient) > 1e-3
    assert torch.equal(second.hypergradient["x"], again.hypergradient["x"])


def test_central_differences_are_the_gradient_of_what_they_claim():
    check_estimator(Penalty(central=True), seeds=(0,))


def test_whole_differences_take_no_gradient_of_the_upper_loss():
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(4, 0.3, case.y).path
    assert not ZerothOrder().needs.second_order
    whole = case.estimate(ZerothOrder(samples=5), LowerSolution(case.y, path=path)).stats
    partial = case.estimate(
        ZerothOrder(samples=5, partial=True), LowerSolution(case.y, path=path)
    ).stats
    assert whole.gradients == 4 + 2 * 5 * 4
    assert partial.gradients == whole.gradients + 1
