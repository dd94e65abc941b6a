"""One differentiated step, by its formula and by differences."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.sama import Sama
from bilevel.estimators.unroll import Unroll
from bilevel.functional import hypergradient
from bilevel.types import LowerSolution
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative


def test_one_step_equals_its_formula():
    case = closed_form(PROBLEMS[3], 0)
    k, x, start = case.problem.constants, case.x["x"], offset(case.y, 1.0)
    lr = 0.3
    y = start["y"] - lr * (k["A"] @ start["y"] - k["B"] @ x - k["c"])
    F_x = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    F_y = y - k["t"] + k["D"] @ x
    expected = {"x": F_x + lr * k["B"].T @ F_y}
    for estimator in (OneStep(lr=lr), OneStep(lr=lr, finite_difference=True)):
        got = case.estimate(estimator, start)
        assert_close(got.hypergradient, expected, rtol=1e-9)
    assert relative(case.estimate(OneStep(lr=lr / 2), start).hypergradient, expected) > 1e-3


def test_one_step_is_unrolling_one_step():
    case = closed_form(PROBLEMS[4], 0)
    start = offset(case.y, 0.5)
    path = case.record(1, 0.1, start).path
    assert_close(
        case.estimate(OneStep(lr=0.1), start).hypergradient,
        case.estimate(Unroll(), LowerSolution(case.y, path=path)).hypergradient,
        rtol=1e-12,
    )


def test_finite_differences_agree_to_second_order_in_epsilon():
    """On a lower loss whose cross derivative is not linear in y: slope 2 in ε."""

    def upper(x, y, batch):
        return ((y["y"] - 2) ** 2).sum() + (x["x"] * y["y"]).sum()

    def lower(x, y, batch):
        return (torch.exp(x["x"] * y["y"]) + y["y"] ** 4).sum()

    from bilevel import hypergradient

    x = {"x": torch.tensor([0.3, -0.5], dtype=torch.float64)}
    y = {"y": torch.tensor([0.7, 1.1], dtype=torch.float64)}
    exact = hypergradient(upper, lower, x, y, estimator=OneStep()).hypergradient
    sizes = (1e-1, 1e-2)
    errors = [
        relative(
            hypergradient(
                upper, lower, x, y, estimator=OneStep(finite_difference=True, epsilon=e)
            ).hypergradient,
            exact,
        )
        for e in sizes
    ]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("estimator", [OneStep(finite_difference=True), Sama()], ids=repr)
def test_a_difference_along_nothing_is_nothing(estimator):
    """∇y F = 0: there is no direction, and the cross term is zero rather than 0 / 0."""
    case = closed_form(PROBLEMS[0], 0)
    got = hypergradient(
        lambda x, y, batch: x["x"].square().sum() + 0.0 * y["y"].sum(),
        case.problem.lower_loss,
        case.x,
        LowerSolution(case.y, path=case.record(2, 0.1, case.y).path),
        estimator=estimator,
        lower_batch=case.lower_batch,
    )
    assert torch.equal(got.hypergradient["x"], 2 * case.x["x"])


def test_a_difference_along_a_unit_vector_is_taken():
    """The size 1 is nothing special: F = uᵀy with ‖u‖ = 1."""
    case = closed_form(PROBLEMS[0], 0)
    u = torch.zeros_like(case.y["y"])
    u[1] = 1.0

    def upper(x, y, batch):
        return u @ y["y"] + 0.0 * x["x"].sum()

    exact, differences = (
        hypergradient(
            upper,
            case.problem.lower_loss,
            case.x,
            case.y,
            estimator=OneStep(finite_difference=difference),
            lower_batch=case.lower_batch,
        ).hypergradient
        for difference in (False, True)
    )
    assert tree.norm(exact) > 0
    assert_close(differences, exact, rtol=1e-9)
