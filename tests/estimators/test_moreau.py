"""The Moreau envelope of the lower level as penalty."""

import pytest
import torch

from bilevel.estimators.moreau import Moreau
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from tests.cases import assert_close
from tests.estimators.typed_out import STEP, assert_moves


def test_moreau_equals_its_formula_and_its_proximal_step(here):
    case, start, at = here
    eta, gamma = 0.2, 0.6
    estimator = Moreau(
        strength=4.0,
        growth=0.4,
        gamma=gamma,
        optimizer=STEP,
        lower=Gradient(steps=1, optimizer=SGD(lr=eta)),
    )
    state, y, theta = None, start["y"], start["y"]
    for call in range(3):
        got = case.estimate(estimator, {"y": y}, state=state)
        theta = theta - eta * (at.G_y(theta) + (theta - y) / gamma)
        strength = 4 * (call + 1) ** 0.4
        h = at.F_x(y) + strength * (at.G_x(y) - at.G_x(theta))
        assert_moves(got, h, y, at.F_y(y) / strength + at.G_y(y) - (y - theta) / gamma)
        value = at.F(y) / strength + at.G(y) - (y - theta).square().sum() / (2 * gamma)
        assert got.moved.loss == pytest.approx(float(value), rel=1e-11)
        assert got.stats.gradients == 3 + 1
        state, y = got.state, got.moved.y["y"]


def test_the_proximal_point_is_where_the_envelope_is(here):
    """(A + I / γ) θ = B x + c + y / γ, at convergence of `solver`."""
    case, start, at = here
    got = case.estimate(Moreau(gamma=0.3, lower=Newton(tolerance=1e-12)), start)
    A, right = at.k["A"], at.k["B"] @ at.x + at.k["c"] + start["y"] / 0.3
    theta = torch.linalg.solve(A + torch.eye(len(A), dtype=torch.float64) / 0.3, right)
    assert_close(got.state["proximal"]["y"], {"y": theta}, rtol=1e-11)
