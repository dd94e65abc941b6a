"""Implicit differentiation against closed forms and predicted slopes."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.neumann import Neumann
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative

EXACT = [
    Implicit(solver=CG(iterations=3000, tolerance=1e-12)),
    Implicit(solver=Dense()),
    Implicit(solver=Neumann(iterations=60_000, scale=0.2, tolerance=1e-12)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize("estimator", EXACT, ids=["cg", "dense", "neumann"])
def test_agrees_with_the_closed_form(estimator, make, seed):
    case = closed_form(make, seed)
    values = torch.linalg.eigvalsh(case.hessian())
    condition = float(values[-1] / values[0])
    if isinstance(estimator.solver, Neumann) and condition > 1e3:
        pytest.skip("a Neumann series needs as many terms as the condition number")
    estimate = case.estimate(estimator)
    # ‖error‖ ≤ condition · (solver tolerance + rounding), times the size of the cross term
    assert_close(estimate.hypergradient, case.truth, rtol=condition * 1e-11)
    assert estimate.stats.residual <= max(1e-12, condition * 1e-15)


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_one_cg_step_does_not():
    """Negative control: the check above can fail."""
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(
            case.estimate(Implicit(solver=CG(iterations=1))).hypergradient, case.truth, rtol=1e-7
        )


@pytest.mark.parametrize("make", PROBLEMS[:2], ids=NAMES[:2])
@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_cg_is_exact_in_as_many_products_as_unknowns(make):
    case = closed_form(make, 1)
    m = tree.size(case.y)
    full = case.estimate(Implicit(solver=CG(iterations=4 * m, tolerance=1e-10)))
    assert relative(full.hypergradient, case.truth) < 1e-6
    few = case.estimate(Implicit(solver=CG(iterations=m // 3, tolerance=1e-10)))
    assert relative(few.hypergradient, case.truth) > 1e-4


def test_damping_solves_the_damped_system():
    case = closed_form(PROBLEMS[0], 0)
    damping = 0.3
    got = case.estimate(Implicit(solver=Dense(), damping=damping))
    k, x, y = case.problem.constants, case.x["x"], case.y["y"]
    damped = k["A"] + damping * torch.eye(len(y), dtype=torch.float64)
    v = torch.linalg.solve(damped, y - k["t"] + k["D"] @ x)
    direct = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    assert_close(got.hypergradient, {"x": direct + k["B"].T @ v}, rtol=1e-10)
    assert relative(got.hypergradient, case.truth) > 0.01


def test_error_of_implicit_is_linear_in_the_lower_error():
    """Off the solution by δ the hypergradient of a quadratic is off by O(δ): slope 1."""
    case = closed_form(PROBLEMS[0], 0)
    sizes = [1e-1, 1e-3, 1e-5]
    errors = [
        relative(
            case.estimate(Implicit(solver=Dense()), offset(case.y, d)).hypergradient, case.truth
        )
        for d in sizes
    ]
    slope = math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1])
    assert slope == pytest.approx(1.0, abs=0.02)


def test_error_of_neumann_falls_at_the_norm_of_the_iteration():
    case = closed_form(PROBLEMS[0], 0)
    scale = 0.9
    ratio = max(abs(1 - scale * float(v)) for v in torch.linalg.eigvalsh(case.hessian()))
    errors = [
        relative(
            case.estimate(Implicit(solver=Neumann(iterations=k, scale=scale))).hypergradient,
            case.truth,
        )
        for k in (40, 80)
    ]
    assert (errors[1] / errors[0]) ** (1 / 40) == pytest.approx(ratio, rel=5e-3)
