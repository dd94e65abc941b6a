"""Forward differentiation: exactness, cost, and random directions."""

import pytest

from bilevel.errors import ProblemError
from bilevel.estimators.forward import Forward
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.types import LowerSolution
from tests.cases import PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.shared import OPTIMIZERS


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_forward_equals_reverse(optimizer):
    for make in (PROBLEMS[0], PROBLEMS[4]):
        case = closed_form(make, 0)
        start = offset(case.y, 2.0)
        path = case.record(7, 0.1, start).path
        path = type(path)(optimizer, start, optimizer.init(start), path.batches)
        reverse = case.estimate(Unroll(), LowerSolution(case.y, path=path))
        forward = case.estimate(Forward(), LowerSolution(case.y, path=path))
        assert_close(forward.hypergradient, reverse.hypergradient, rtol=1e-10)
        shorter = type(path)(optimizer, start, optimizer.init(start), path.batches[1:])
        control = case.estimate(Forward(), LowerSolution(case.y, path=shorter)).hypergradient
        assert relative(control, reverse.hypergradient) > 1e-6


def test_forward_costs_dim_x_products_a_step():
    case = closed_form(PROBLEMS[0], 0)
    stats = case.estimate(
        Forward(), LowerSolution(case.y, path=case.record(6, 0.1, case.y).path)
    ).stats
    assert (stats.hvps, stats.cross_products) == (5 * 6, 5 * 6)
    stats = case.estimate(
        Forward(directions=2), LowerSolution(case.y, path=case.record(6, 0.1, case.y).path)
    ).stats
    assert (stats.hvps, stats.cross_products) == (2 * 6, 2 * 6)


@pytest.mark.parametrize("estimator", [Forward(), ZerothOrder()], ids=repr)
def test_without_a_path_there_is_a_remedy(estimator):
    with pytest.raises(ProblemError, match="record=True"):
        closed_form(PROBLEMS[0], 0).estimate(estimator)
