"""The penalty method: its predicted slope, its state, and what it flags."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.estimators.penalty import Penalty
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.types import Point
from bilevel_problems.quadratic import Quadratic
from tests.cases import PROBLEMS, closed_form, relative


@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[5]], ids=["quadratic", "badly scaled"])
def test_penalty_error_falls_as_predicted(make, central, order):
    """O(1/λ), and O(1/λ²) for central differences, in the limit of exact penalised solves."""
    case = closed_form(make, 0)
    strengths = (1e3, 1e4)
    errors = [
        relative(
            case.estimate(
                Penalty(strength=s, central=central, lower=Newton(tolerance=1e-13))
            ).hypergradient,
            case.truth,
        )
        for s in strengths
    ]
    slope = math.log10(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.1)


def test_penalty_takes_no_second_derivative_and_goes_on_from_its_state():
    case = closed_form(PROBLEMS[0], 0)
    estimator = Penalty(strength=100.0, lower=Gradient(steps=40, optimizer=SGD(lr=0.9)))
    assert not estimator.needs.second_order
    first = case.estimate(estimator)
    assert (first.stats.hvps, first.stats.cross_products) == (0, 0)
    assert first.stats.gradients == 3 + 2 * 40
    exact = case.estimate(Penalty(strength=100.0, lower=Newton())).hypergradient
    gaps, state = [], None
    for _ in range(3):
        estimate = case.estimate(estimator, state=state)
        state = estimate.state
        gaps.append(relative(estimate.hypergradient, exact))
    assert gaps[2] < 0.1 * gaps[0]  # warm: each call goes on where the last one ended


def test_a_penalised_problem_without_a_minimum_is_flagged():
    """G − F/λ is concave somewhere at λ = 2: central differences must not be silently wrong."""
    case = closed_form(PROBLEMS[0], 0)
    got = case.estimate(Penalty(strength=2.0, central=True, lower=Newton()))
    assert got.stats.converged is False
    assert case.estimate(Penalty(strength=1e3, central=True, lower=Newton())).stats.converged


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[4]], ids=["quadratic", "ridge"])
def test_the_penalty_says_what_its_problem_is_left_with(make, central):
    """To first order the residual of the adjoint system: that of λ (y − y_λ), worked out densely."""
    case, strength = closed_form(make, 0), 1e4
    for steps in (1, 20):
        solver = Gradient(steps=steps, optimizer=SGD(lr=0.1))
        got = case.estimate(Penalty(strength=strength, lower=solver, central=central))
        ends, b = got.state, case.losses()
        F_y = tree.flatten(gradients(b.upper, Point(case.x, case.y))[2])
        lefts = []
        for sign, end in zip((1, -1), ends.values(), strict=False):
            v = sign * strength * (tree.flatten(case.y) - tree.flatten(end["y"]))
            lefts.append(float((F_y - case.hessian() @ v).norm() / F_y.norm()))
        assert got.stats.residual == pytest.approx(max(lefts), rel=0.02)
        assert got.stats.residual > 1e-3
    solved = case.estimate(Penalty(strength=strength, lower=Newton(), central=central))
    assert solved.stats.residual < 1e-6
    assert solved.stats.gradients > 0


def test_a_run_warns_of_a_penalised_problem_that_is_not_solved():
    def warnings(solver):
        setup = Setup(
            Quadratic(),
            Newton(),
            Upper(steps=1),
            Penalty(lower=solver),
            dtype=torch.float64,
        )
        return {e.kind: e.message for e in run(setup, start(setup)) if isinstance(e, Warned)}

    found = warnings(Gradient())
    assert "estimator.lower.steps" in found["residual"]
    assert "residual" not in warnings(Newton())
