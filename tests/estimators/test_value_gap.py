"""The gap of the lower value, weighed: its formula."""

import pytest

from bilevel.estimators.value_gap import ValueGap
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from tests.estimators.typed_out import STEP, assert_moves, descend


def test_value_gap_equals_its_formula_twice(here):
    case, start, at = here
    estimator = ValueGap(
        strength=7.0, optimizer=STEP, lower=Gradient(steps=4, optimizer=SGD(lr=0.3))
    )
    state, y, z = None, start["y"], start["y"]
    for _ in range(2):  # z goes on from the last one
        got = case.estimate(estimator, {"y": y}, state=state)
        z = descend(z, at.G_y, 4, 0.3)
        h = at.F_x(y) + 7 * (at.G_x(y) - at.G_x(z))
        assert_moves(got, h, y, at.G_y(y) + at.F_y(y) / 7)
        assert got.moved.loss == pytest.approx(float(at.G(y) + at.F(y) / 7), rel=1e-12)
        assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (3 + 4, 0, 0)
        state, y = got.state, got.moved.y["y"]
