"""Both losses as one."""

import pytest

from bilevel.errors import ConvergenceError
from bilevel.estimators.joint import Joint
from bilevel.optimizers.differentiable import SGD
from tests.cases import PROBLEMS, closed_form, relative
from tests.estimators.typed_out import STEP, assert_moves, resting, run, solution


def test_joint_equals_its_formula(here):
    case, start, at = here
    y = start["y"]
    got = case.estimate(Joint(weight=2.5, optimizer=STEP), start)
    assert_moves(got, at.F_x(y) + 2.5 * at.G_x(y), y, at.F_y(y) + 2.5 * at.G_y(y))
    assert got.moved.loss == pytest.approx(float(at.F(y) + 2.5 * at.G(y)), rel=1e-12)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 0, 0)


def test_the_joint_loss_rests_elsewhere_however_heavy_the_lower_loss():
    """Its error goes to a limit that is not 0, where that of the value gap goes on falling."""
    case = closed_form(PROBLEMS[0], 0)
    best = solution(case.problem)
    errors = [relative(resting(Joint(weight=w, optimizer=STEP), case)[0], best) for w in (1e2, 1e4)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[1] > 0.1


def test_the_joint_loss_may_have_no_limit():
    """G falls without bound in (x, y) here; the bilevel problem has a solution all the same."""
    with pytest.raises(ConvergenceError):
        run(Joint(weight=10.0, optimizer=SGD(lr=0.1)), 2000, 0.1)
