"""The averaged method of multipliers: its loop typed out, its limit, its counter-example."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.calculus.finite_differences import central
from bilevel.errors import ProblemError
from bilevel.estimators.averaged_multipliers import AveragedMultipliers
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import stream
from bilevel.types import Losses, Point, Structure
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative

DOUBLE = {"dtype": torch.float64}


def typed(k, rho, x, y, mu):
    """(∇x F, ∇y F, ∇y φ, ∂²yy φ, ∂²xy φ) of the quadratic problem, written down."""
    F_y, G_y = y - k["t"] + k["D"] @ x, k["A"] @ y - k["B"] @ x - k["c"]
    F_x = rho * (x - k["s"]) + k["D"].T @ y
    H = mu * torch.eye(len(y), **DOUBLE) + (1 - mu) * k["A"]
    return F_x, F_y, mu * F_y + (1 - mu) * G_y, H, mu * k["D"] - (1 - mu) * k["B"]


def test_it_is_the_published_loop():
    """x, y and v all move from one point; the step of x falls as in the paper's experiment."""
    case, tau, p = closed_form(PROBLEMS[0], 1), 1 / 40, 10
    k, rho = case.problem.constants, case.problem.rho
    estimator = AveragedMultipliers(
        mu=0.8, mu_decay=1 / p, lower_lr=0.2, multiplier_lr=0.3, multiplier_decay=tau / 2
    )
    x, y, v, state = case.x["x"], offset(case.y, 1.0)["y"], torch.zeros_like(case.y["y"]), None
    for call in range(1, 7):
        mu = 0.8 * call ** (-1 / p)
        F_x, F_y, g, H, cross = typed(k, rho, x, y, mu)
        got = replace(case, x={"x": x}).estimate(estimator, {"y": y}, state=state)
        h = F_x - cross.T @ v
        assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
        assert got.moved.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
        left = float((H @ v - F_y).norm() / F_y.norm())
        assert got.stats.residual == pytest.approx(left, rel=1e-12)
        assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (3, 2, 2)
        y, v = y - 0.2 * g, v - 0.3 * call ** (-tau / 2) * (H @ v - F_y)
        assert_close(got.moved.y, {"y": y}, rtol=1e-12)
        assert_close(got.state["v"], {"y": v}, rtol=1e-12)
        x = x - 0.1 * call ** (-1.5 * tau) * mu**3 * h
        y, state = got.moved.y["y"], got.state
    before = relative({"x": F_x - cross.T @ (v + 0)}, {"x": h})
    assert before > 1e-3, "the multiplier after its step would have done as well"


def test_steps_are_calls_with_x_held():
    case = closed_form(PROBLEMS[0], 0)
    one = AveragedMultipliers(mu_decay=0.0)
    many = case.estimate(replace(one, steps=4), y := offset(case.y, 1.0))
    state = None
    for _ in range(4):
        got = case.estimate(one, y, state=state)
        y, state = got.moved.y, got.state
    assert_close(many.hypergradient, got.hypergradient, rtol=1e-13)
    assert_close(many.moved.y, got.moved.y, rtol=1e-13)
    assert (many.stats.gradients, many.stats.hvps, many.stats.cross_products) == (12, 8, 2)
    assert (many.moved.steps, many.stats.iterations) == (4, 4)


def test_each_loss_sees_its_own_batch():
    def upper(x, y, batch):
        return (batch * (y["y"] - 1) * x["x"]).square().sum() / 2

    def lower(x, y, batch):
        return (y["y"] - batch * x["x"]).square().sum() / 2

    x, y = torch.tensor([2.0], **DOUBLE), torch.tensor([0.25], **DOUBLE)
    estimator = AveragedMultipliers(mu=0.5, multiplier_lr=1.0, lower_lr=0.1)
    at = {"x": x}, {"y": y}
    first = hypergradient(upper, lower, *at, estimator=estimator, upper_batch=3.0, lower_batch=5.0)
    F_x, F_y = 9 * (y - 1) ** 2 * x, 9 * x**2 * (y - 1)
    assert_close(first.hypergradient, {"x": F_x}, rtol=1e-13)  # v = 0
    assert_close(first.state["v"], {"y": F_y}, rtol=1e-13)
    assert_close(first.moved.y, {"y": y - 0.05 * (F_y + y - 5 * x)}, rtol=1e-13)


# the limit -------------------------------------------------------------------------------------


def settled(**options):
    return AveragedMultipliers(lower_lr=0.9, multiplier_lr=0.9, **options).tight(0)


@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[3]], ids=[NAMES[0], NAMES[3]])
def test_settled_without_an_average_it_is_the_adjoint_and_the_hypergradient(make):
    """To the tolerance, 1e-9, times the condition number."""
    case = closed_form(make, 0)
    got = case.estimate(settled(mu=0.0), offset(case.y, 1.0))
    k = case.problem.constants
    adjoint = torch.linalg.solve(case.hessian(), case.y["y"] - k["t"] + k["D"] @ case.x["x"])
    assert got.stats.converged
    assert_close(got.state["v"], {"y": adjoint}, rtol=1e-6)
    assert_close(got.hypergradient, case.truth, rtol=1e-6)
    steps = got.stats.iterations
    counted = got.stats.gradients, got.stats.hvps, got.stats.cross_products
    assert counted == (2 * steps, steps, 1)


def test_its_error_falls_as_the_average_does():
    case = closed_form(PROBLEMS[0], 0)
    errors = [
        relative(case.estimate(settled(mu=mu)).hypergradient, case.truth) for mu in (1e-3, 1e-4)
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)
    assert errors[1] < 0.05


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
def test_it_is_the_gradient_of_what_it_claims(mu):
    case, estimator = closed_form(PROBLEMS[0], 0), AveragedMultipliers(mu=mu)
    y = offset(case.y, 0.7)

    def error(claiming):
        objective = claiming.objective(case.losses(), Point(case.x, y))
        found = central(objective, case.x, stream(0, "differences"))
        return float((found.along(h) - found.slopes).norm() / found.slopes.norm()), found.error

    h = case.estimate(settled(mu=mu), y).hypergradient
    off, rounding = error(estimator)
    assert off <= max(1e-7, 10 * rounding)
    assert error(replace(estimator, mu=mu + 0.01))[0] > 1e-4  # control


def test_what_is_not_settled_says_so():
    case = closed_form(PROBLEMS[0], 0)
    start = offset(case.y, 1.0)
    few = case.estimate(replace(settled(), steps=3), start).stats
    assert few.converged is False
    assert few.iterations == 3
    enough = case.estimate(replace(settled(), tolerance=1e-3), start)
    assert enough.stats.converged is True
    assert enough.stats.iterations < 5000
    assert max(enough.stats.residual, enough.moved.gradient_norm) <= 1e-3
    assert case.estimate(AveragedMultipliers(), start).stats.converged is None


# many lower solutions --------------------------------------------------------------------------


def upper(x, y, batch):
    return 0.5 * ((x["x"] - y["z"]).square() + (y["y"] - 1).square()).sum()


def lower(x, y, batch):
    return 0.5 * y["y"].square().sum() - (x["x"] * y["y"]).sum()


def descend(estimator, count, lr=0.1):
    """(x, y, the last estimate) of the merely convex example, from 0.01 as published."""
    x, (y, z), state = torch.full((3,), 0.01, **DOUBLE), torch.full((2, 3), 0.01, **DOUBLE), None
    at = {"y": y, "z": z}
    for _ in range(count):
        got = hypergradient(upper, lower, {"x": x}, at, estimator=estimator, state=state)
        x = x - lr * got.hypergradient["x"]
        at, state = got.moved.y if got.moved else at, got.state
    return x, at, got


def test_it_solves_the_counter_example_and_does_not_without_its_average():
    """Liu et al. (2023): every z minimises G. x, y and z of the solution are all 1."""
    one = torch.ones(3, **DOUBLE)
    x, y, got = descend(AveragedMultipliers(multiplier_decay=1 / 80), 1500)
    for found in (x, y["y"], y["z"]):
        torch.testing.assert_close(found, one, rtol=1e-6, atol=0)
    assert got.moved.gradient_norm < 1e-6
    # without the average z stays where it is, and x settles half way
    x, y, _ = descend(AveragedMultipliers(mu=0.0), 300)
    torch.testing.assert_close(x, torch.full((3,), 0.505, **DOUBLE), rtol=1e-3, atol=0)
    assert torch.equal(y["z"], torch.full((3,), 0.01, **DOUBLE))


def test_the_other_two_settle_half_way():
    """G does not know z, so their estimates take it as given: 0 at x = (1 + z) / 2, and not at 1."""

    def ask(x, estimator):
        x = torch.full((3,), x, **DOUBLE)
        at = {"y": x.clone(), "z": torch.full((3,), 0.01, **DOUBLE)}
        return hypergradient(upper, lower, {"x": x}, at, estimator=estimator).hypergradient

    unrolled = Unroll(along=Gradient(steps=60, optimizer=SGD(lr=0.5)))
    for estimator in (Implicit(), unrolled):
        assert tree.norm(ask(0.505, estimator)) < 1e-12
        assert tree.norm(ask(1.0, estimator)) > 0.9


def test_an_entry_that_neither_loss_bends_stays_out_of_the_system():
    case = closed_form(PROBLEMS[0], 0)

    def with_another(x, y, batch):
        return case.problem.upper_loss(x, y, batch) + 5 * y["unused"].sum()

    got = hypergradient(
        with_another,
        case.problem.lower_loss,
        case.x,
        {**case.y, "unused": torch.ones(3, **DOUBLE)},
        estimator=settled(mu=0.0),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
    )
    assert got.stats.converged
    assert_close(got.hypergradient, case.truth, rtol=1e-6)
    assert tree.norm({"u": got.state["v"]["unused"]}) == 0


def test_a_set_that_holds_y_is_refused():
    case = closed_form(PROBLEMS[0], 0)
    estimator, at, losses = AveragedMultipliers(), Point(case.x, case.y), case.losses()
    restricted = replace(losses.lower, structure=Structure(project=lambda y: y))
    with pytest.raises(ProblemError, match="estimator: unroll"):
        estimator.estimate(Losses(losses.upper, restricted), at, estimator.init(at))
