"""Penalty, forward and zeroth-order estimators: exactness, predicted slopes, unbiasedness."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.calculus.products import gradients
from bilevel.errors import ProblemError
from bilevel.estimators.forward import Forward
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.testing import check_estimator
from bilevel.types import Point
from bilevel_problems.quadratic import Quadratic
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.test_estimators import OPTIMIZERS


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_forward_equals_reverse(optimizer):
    for make in (PROBLEMS[0], PROBLEMS[4]):
        case = closed_form(make, 0)
        start = offset(case.y, 2.0)
        path = case.record(7, 0.1, start).path
        path = type(path)(optimizer, start, optimizer.init(start), path.batches)
        reverse = case.estimate(Unroll(), path=path)
        forward = case.estimate(Forward(), path=path)
        assert_close(forward.hypergradient, reverse.hypergradient, rtol=1e-10)
        shorter = type(path)(optimizer, start, optimizer.init(start), path.batches[1:])
        control = case.estimate(Forward(), path=shorter).hypergradient
        assert relative(control, reverse.hypergradient) > 1e-6


def test_forward_costs_dim_x_products_a_step():
    case = closed_form(PROBLEMS[0], 0)
    stats = case.estimate(Forward(), path=case.record(6, 0.1, case.y).path).stats
    assert (stats.hvps, stats.cross_products) == (5 * 6, 5 * 6)
    stats = case.estimate(Forward(directions=2), path=case.record(6, 0.1, case.y).path).stats
    assert (stats.hvps, stats.cross_products) == (2 * 6, 2 * 6)


def mean_and_error(case, estimator, path, calls):
    state, draws = None, []
    for _ in range(calls):
        estimate = case.estimate(estimator, path=path, state=state)
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
    truth = tree.flatten(case.estimate(Unroll(), path=path).hypergradient)
    mean, error = mean_and_error(case, estimator, path, 300)
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
    first = case.estimate(estimator, path=path)
    second = case.estimate(estimator, path=path, state=first.state)
    again = case.estimate(estimator, path=path, state=first.state)
    assert relative(second.hypergradient, first.hypergradient) > 1e-3
    assert torch.equal(second.hypergradient["x"], again.hypergradient["x"])


@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[5]], ids=["quadratic", "badly scaled"])
def test_penalty_error_falls_as_predicted(make, central, order):
    """O(1/λ), and O(1/λ²) for central differences, in the limit of exact penalised solves."""
    case = closed_form(make, 0)
    strengths = (1e3, 1e4)
    errors = [
        relative(
            case.estimate(
                Penalty(strength=s, central=central, solver=Newton(tolerance=1e-13))
            ).hypergradient,
            case.truth,
        )
        for s in strengths
    ]
    slope = math.log10(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.1)


def test_central_differences_are_the_gradient_of_what_they_claim():
    check_estimator(Penalty(central=True), seeds=(0,))


def test_penalty_takes_no_second_derivative_and_goes_on_from_its_state():
    case = closed_form(PROBLEMS[0], 0)
    estimator = Penalty(strength=100.0, solver=Gradient(steps=40, optimizer=SGD(lr=0.9)))
    assert not estimator.needs.second_order
    first = case.estimate(estimator)
    assert (first.stats.hvps, first.stats.cross_products) == (0, 0)
    assert first.stats.gradients == 3 + 2 * 40
    exact = case.estimate(Penalty(strength=100.0, solver=Newton())).hypergradient
    gaps, state = [], None
    for _ in range(3):
        estimate = case.estimate(estimator, state=state)
        state = estimate.state
        gaps.append(relative(estimate.hypergradient, exact))
    assert gaps[2] < 0.1 * gaps[0]  # warm: each call goes on where the last one ended


@pytest.mark.parametrize("estimator", [Forward(), ZerothOrder()], ids=repr)
def test_without_a_path_there_is_a_remedy(estimator):
    with pytest.raises(ProblemError, match="record=True"):
        closed_form(PROBLEMS[0], 0).estimate(estimator)


def test_a_penalised_problem_without_a_minimum_is_flagged():
    """G − F/λ is concave somewhere at λ = 2: central differences must not be silently wrong."""
    case = closed_form(PROBLEMS[0], 0)
    got = case.estimate(Penalty(strength=2.0, central=True, solver=Newton()))
    assert got.stats.converged is False
    assert case.estimate(Penalty(strength=1e3, central=True, solver=Newton())).stats.converged


def test_whole_differences_take_no_gradient_of_the_upper_loss():
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(4, 0.3, case.y).path
    assert not ZerothOrder().needs.second_order
    whole = case.estimate(ZerothOrder(samples=5), path=path).stats
    partial = case.estimate(ZerothOrder(samples=5, partial=True), path=path).stats
    assert whole.gradients == 4 + 2 * 5 * 4
    assert partial.gradients == whole.gradients + 1


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[4]], ids=["quadratic", "ridge"])
def test_the_penalty_says_what_its_problem_is_left_with(make, central):
    """To first order the residual of the adjoint system: that of λ (y − y_λ), worked out densely."""
    case, strength = closed_form(make, 0), 1e4
    for steps in (1, 20):
        solver = Gradient(steps=steps, optimizer=SGD(lr=0.1))
        got = case.estimate(Penalty(strength=strength, solver=solver, central=central))
        ends, b = got.state, case.losses()
        F_y = tree.flatten(gradients(b.upper, Point(case.x, case.y))[2])
        lefts = []
        for sign, end in zip((1, -1), ends.values(), strict=False):
            v = sign * strength * (tree.flatten(case.y) - tree.flatten(end["y"]))
            lefts.append(float((F_y - case.hessian() @ v).norm() / F_y.norm()))
        assert got.stats.residual == pytest.approx(max(lefts), rel=0.02)
        assert got.stats.residual > 1e-3
    solved = case.estimate(Penalty(strength=strength, solver=Newton(), central=central))
    assert solved.stats.residual < 1e-6
    assert solved.stats.gradients > 0


def test_a_run_warns_of_a_penalised_problem_that_is_not_solved():
    def warnings(solver):
        setup = Setup(
            Quadratic(),
            Newton(),
            Upper(steps=1),
            Penalty(solver=solver),
            dtype=torch.float64,
        )
        return {e.kind: e.message for e in run(setup, start(setup)) if isinstance(e, Warned)}

    found = warnings(Gradient())
    assert "estimator.solver.steps" in found["residual"]
    assert "residual" not in warnings(Newton())
