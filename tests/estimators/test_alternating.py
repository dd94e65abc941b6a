"""The direct gradient alone."""

from bilevel.estimators.alternating import Alternating
from tests.cases import PROBLEMS, assert_close, closed_form


def test_alternating_is_the_direct_gradient():
    case = closed_form(PROBLEMS[0], 0)
    k, x, y = case.problem.constants, case.x["x"], case.y["y"]
    direct = case.problem.rho * (x - k["s"]) + k["D"].T @ y
    got = case.estimate(Alternating())
    assert_close(got.hypergradient, {"x": direct}, rtol=1e-13)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (1, 0, 0)
