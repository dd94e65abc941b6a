"""The regularised gap under constraints that hold y."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient
from bilevel.calculus.finite_differences import central
from bilevel.estimators.moreau import Moreau
from bilevel.estimators.regularised_gap import RegularisedGap
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import stream
from bilevel.types import Counts, Loss, Losses, Point, Structure
from tests.cases import assert_close, relative
from tests.estimators.typed_out import STEP, assert_moves, steps


class Bounded:
    """G = ½ ‖y − x‖² over y ≤ 1 and F = ½ ‖y − t‖² + ½ ‖x − s‖².

    The first bound is active with multiplier x₁ − 1, so x₁* = s₁ = 2 and y₁* = 1; the second is
    not, so x₂* = y₂* = (s₂ + t₂) / 2 = −¼.
    """

    s, t, best = (torch.tensor(v, dtype=torch.float64) for v in ((2, -1), (3, 0.5), (2, -0.25)))
    structure = Structure(constraints=lambda x, y, batch: {"inequality": y["y"] - 1})

    def ask(self, estimator, x, y, state=None, **options):
        return hypergradient(
            lambda x, y, b: (
                0.5 * (y["y"] - self.t).square().sum() + 0.5 * (x["x"] - self.s).square().sum()
            ),
            lambda x, y, b: 0.5 * (y["y"] - x["x"]).square().sum(),
            {"x": x},
            {"y": y},
            estimator=estimator,
            state=state,
            **options,
        )

    def rest(self, estimator, count, **options):
        x, y, state = torch.zeros_like(self.s), torch.zeros_like(self.s), None
        for _ in range(count):
            got = self.ask(estimator, x, y, state, **options)
            x = x - 0.5 / estimator.strength * got.hypergradient["x"]
            y, state = got.moved.y["y"], got.state
        return x, y, state


def test_regularised_gap_equals_its_formula():
    at, eta, g1, g2 = Bounded(), 0.2, 0.7, 0.4
    estimator = RegularisedGap(
        strength=4.0,
        growth=0.3,
        gamma1=g1,
        gamma2=g2,
        multiplier_lr=0.5,
        multiplier_bound=0.05,
        optimizer=STEP,
        lower=steps(1, eta),
    )
    x = torch.tensor([3.0, -0.5], dtype=torch.float64)
    y = torch.tensor([1.2, 0.4], dtype=torch.float64)
    theta, z, state = y, torch.zeros_like(y), None
    bounds = set()
    for call in range(5):
        got = at.ask(estimator, x, y, state, structure=at.structure)
        theta = theta - eta * (theta - x + z + (theta - y) / g1)
        mu = (z + g2 * (y - 1)).clamp(min=0)
        strength = 4 * (call + 1) ** 0.3
        h = x - at.s + strength * ((x - y) - (x - theta))
        assert_moves(got, h, y, (y - at.t) / strength + y - x + mu - (y - theta) / g1)
        assert got.stats.gradients == 4
        z = (z - 0.5 * ((mu - z) / g2 - (theta - 1))).clamp(0, 0.05)
        torch.testing.assert_close(got.state["z"]["inequality"], z, rtol=1e-12, atol=0)
        bounds |= set(z.tolist()) & {0.0, 0.05}
        y, state = got.moved.y["y"], got.state
    assert bounds == {0.0, 0.05}, "one of the bounds of z was never met"


def test_equalities_have_multipliers_of_either_sign():
    at = Bounded()
    equal = Structure(constraints=lambda x, y, b: {"equality": y["y"].sum()[None] - x["x"][:1]})
    got = at.ask(
        RegularisedGap(optimizer=STEP, gamma2=0.5, lower=steps(1, 0.2)),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
        y := torch.tensor([0.5, 0.2], dtype=torch.float64),
        structure=equal,
    )
    mu = 0.5 * (0.7 - 3.0)  # negative: no max with 0
    theta = y - 0.2 * (y - torch.tensor([3.0, 1.0]))
    x_part = torch.tensor([3.0, 1.0], dtype=torch.float64) - at.s
    h = x_part + 10 * (theta - y + torch.tensor([-mu, 0.0], dtype=torch.float64))
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    z = -0.1 * (mu / 0.5 - (float(theta.sum()) - 3.0))
    assert float(got.state["z"]["equality"]) == pytest.approx(z, rel=1e-12)


def test_without_constraints_the_regularised_gap_is_the_moreau_envelope(here):
    case, start, _ = here
    state = other = None
    for _ in range(3):
        got = case.estimate(RegularisedGap(gamma1=0.6, growth=0.2), start, state=state)
        same = case.estimate(Moreau(gamma=0.6, growth=0.2), start, state=other)
        assert torch.equal(got.hypergradient["x"], same.hypergradient["x"])
        assert torch.equal(got.moved.y["y"], same.moved.y["y"])
        assert got.stats.gradients == same.stats.gradients
        state, other, start = got.state, same.state, got.moved.y


def test_the_regularised_gap_is_the_gradient_of_what_it_claims_under_constraints():
    estimator = RegularisedGap(lower=Newton(tolerance=1e-13), gamma2=0.3)
    y = torch.tensor([1.8, 0.4], dtype=torch.float64)
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)

    def lower(x, y, batch):  # x in the constraints too
        return 0.5 * (y["y"] - x["x"]).square().sum()

    structure = Structure(constraints=lambda x, y, b: {"inequality": y["y"] - x["x"].square()})
    losses = Losses(
        Loss(lambda x, y, b: (y["y"] * x["x"]).sum(), None, Counts(), "upper"),
        Loss(lower, None, Counts(), "lower", structure=structure),
    )
    here = Point({"x": x}, {"y": y})
    got = estimator.estimate(losses, here, estimator.init(here))
    found = central(estimator.objective(losses, here), here.x, stream(0, "d"))
    assert_close({"x": found.slopes}, got.hypergradient, rtol=1e-8)
    loose = central(replace(estimator, gamma2=0.31).objective(losses, here), here.x, stream(0, "d"))
    assert relative({"x": loose.slopes}, got.hypergradient) > 1e-3


def test_under_constraints_it_rests_off_by_one_over_the_strength():
    at = Bounded()
    errors = []
    for strength in (10.0, 40.0):
        estimator = RegularisedGap(
            strength=strength,
            multiplier_lr=0.3,
            optimizer=SGD(lr=0.3),
            lower=steps(1, 0.5),
        )
        x, y, state = at.rest(estimator, int(40 * strength), structure=at.structure)
        errors.append(float((x - at.best).norm()))
        assert float(state["z"]["inequality"][0]) == pytest.approx(1.0, abs=2 / strength)
        assert float(y[0]) == pytest.approx(1.0, abs=2.5 / strength)
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(1.0, abs=0.1)
    blind = at.rest(estimator, 1600)[0]  # the bound is not known: x₁ = (s₁ + t₁) / 2
    assert float(blind[0]) == pytest.approx(2.5, abs=0.02)
