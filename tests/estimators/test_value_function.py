"""The value function with its barrier: formula, limits, and runs."""

import copy
import math

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators.value_function import ValueFunction
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel_problems.quadratic import Quadratic
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.typed_out import against_differences, descend, run, solution


@pytest.mark.parametrize("penalty", ["quadratic", "log"])
def test_value_function_equals_its_formula_twice(here, penalty):
    case, start, at = here
    sigma, theta, steps, lr = 0.7, 0.02, 6, 0.02
    mu = 0.3 if penalty == "log" else 1e-4  # a large one puts all of y below the level
    estimator = ValueFunction(
        penalty=penalty,
        sigma=sigma,
        mu=mu,
        theta=theta,
        decay=0.5,
        lower=Gradient(steps=steps, optimizer=SGD(lr=lr)),
    )
    state, y, z = None, start["y"], start["y"]
    for call in range(2):
        got = case.estimate(estimator, start, state=state)
        s, m, t = (value / (call + 1) ** 0.5 for value in (sigma, mu, theta))
        z = descend(z, lambda z, m=m: at.G_y(z) + m * z, steps, lr)
        level = at.G(z) + m / 2 * z @ z

        def slope(y, level=level, s=s):
            gap = float(at.G(y) - level)
            return max(gap, 0) / s if penalty == "quadratic" else -s / gap

        if penalty == "log" and at.G(y) >= level:
            y = z
        y = descend(y, lambda y, t=t, P=slope: at.F_y(y) + P(y) * at.G_y(y) + t * y, steps, lr)
        h = at.F_x(y) + slope(y) * (at.G_x(y) - at.G_x(z))
        assert_close(got.hypergradient, {"x": h}, rtol=1e-10)
        assert_close(got.moved.y, {"y": y}, rtol=1e-11)
        assert slope(y) > 0
        assert got.moved.steps == steps
        left = at.F_y(y) + slope(y) * at.G_y(y) + t * y
        assert got.moved.gradient_norm == pytest.approx(float(left.norm()), rel=1e-9)
        assert (got.stats.gradients, got.stats.hvps) == (3 + steps + 2 * steps, 0)
        state = got.state


def test_a_barrier_is_refused_a_solver_that_would_cross_it():
    with pytest.raises(ValueError, match="lower: newton"):
        ValueFunction(penalty="log")
    with pytest.raises(ProblemError, match="200"):
        ValueFunction(penalty="log", lower=Newton()).tight(201)


def test_a_start_outside_the_barrier_begins_at_the_regularised_minimum(here):
    """The problem is convex, so where it starts makes no difference to where it ends."""
    case, start, at = here
    estimator = ValueFunction(penalty="log", sigma=1.0, mu=0.1, lower=Newton(tolerance=1e-10))
    outside = offset(case.y, 60.0)
    got, near = case.estimate(estimator, outside), case.estimate(estimator, start)
    z = near.state["value"]["y"]["y"]
    assert at.G(outside["y"]) > at.G(z) + 0.05 * z @ z
    assert_close(got.hypergradient, near.hypergradient, rtol=1e-8)


def test_a_barrier_without_an_inside_has_a_remedy(here):
    case, _, _ = here
    with pytest.raises(ProblemError, match=r"raise mu, or use penalty: quadratic"):
        case.estimate(ValueFunction(penalty="log", mu=0.0, lower=Newton()))


def test_value_function_keeps_its_y_apart_from_the_one_it_hands_back(here):
    case, start, _ = here
    got = case.estimate(ValueFunction(), start)
    kept = copy.deepcopy(got.state)
    got.moved.y["y"].fill_(math.nan)
    assert torch.equal(got.state["upper"]["y"]["y"], kept["upper"]["y"]["y"])


def test_the_function_of_a_barrier_is_claimed_too():
    for mu in (0.1, 1e-3):
        estimator = ValueFunction(penalty="log", mu=mu, lower=Newton())
        error, rounding = against_differences(estimator, lambda e: e, PROBLEMS[0])
        assert error <= max(1e-8, 10 * rounding)


def solved_errors(case, estimators):
    return [relative(case.estimate(e).hypergradient, case.truth) for e in estimators]


def test_the_value_function_tends_to_the_hypergradient_at_the_cube_root():
    """P' = gap / σ and gap = O(1 / P'²), so P' = O(σ^-1/3), which is λ in O(1/λ)."""
    case = closed_form(PROBLEMS[0], 0)
    errors = solved_errors(
        case,
        [
            ValueFunction(sigma=s, mu=0.0, theta=0.0, lower=Newton(steps=200, tolerance=1e-9))
            for s in (1e-5, 1e-8)
        ],
    )
    assert math.log10(errors[0] / errors[1]) / 3 == pytest.approx(1 / 3, abs=0.02)
    assert errors[1] < 0.02


def test_the_barrier_tends_to_it_with_the_root_of_the_slack():
    """With σ at 0 G may be mu/2 ‖z‖² above its least value, and F takes y √mu far from y*."""
    case = closed_form(PROBLEMS[0], 0)
    newton = Newton(tolerance=1e-6)
    errors = solved_errors(
        case,
        [
            ValueFunction(penalty="log", sigma=0.1, mu=mu, theta=0.0, lower=newton)
            for mu in (1e-4, 1e-6)
        ],
    )
    assert math.log10(errors[0] / errors[1]) / 2 == pytest.approx(0.5, abs=0.02)


def test_a_run_of_the_value_function_comes_near_the_solution():
    best = solution(Quadratic())
    estimator = ValueFunction(sigma=1e-4, mu=0.0, theta=0.0)
    errors = [relative(run(estimator, count, 1.5e-2)[1].x, best) for count in (1, 30)]
    assert errors[0] > 1
    assert errors[1] < 0.2
