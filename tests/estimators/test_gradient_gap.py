"""The squared norm of the lower gradient as penalty."""

import pytest

from bilevel.estimators.gradient_gap import GradientGap
from tests.estimators.typed_out import STEP, assert_moves


def test_gradient_gap_equals_its_formula(here):
    case, start, at = here
    y, k = start["y"], at.k
    got = case.estimate(GradientGap(strength=3.0, optimizer=STEP), start)
    g = at.G_y(y)
    assert_moves(got, at.F_x(y) - 2 * 3 * k["B"].T @ g, y, at.F_y(y) / 3 + 2 * k["A"] @ g)
    assert got.moved.loss == pytest.approx(float(at.F(y) / 3 + g @ g), rel=1e-12)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 1, 1)
