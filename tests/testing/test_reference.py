"""When the tight solve of a restricted lower level is given up."""

from __future__ import annotations

import itertools

import pytest
import torch

from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.lower.gradient import Gradient
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check, reference
from bilevel.testing.check_scenes import CheckScenes
from bilevel_problems.box_qp import BoxQP


@pytest.mark.parametrize(
    ("factor", "solves", "comes"),
    [
        (0.5, 50, True),
        (0.98, 50, True),  # rests after 1,368 solves: within four times 950
        (0.995, 50, False),  # after 5,512
        (0.995, 900, False),
        (1.0, 50, False),
        (1.01, 50, False),
    ],
)
def test_a_rate_is_followed_to_its_end(factor, solves, comes):
    moves = [factor**k for k in range(solves)]
    assert reference._comes_to_rest(moves) is comes


@pytest.mark.parametrize(
    ("lr", "stationary", "least", "most"),
    [
        (0.1, True, 51, 1000),  # contracts, and is looked at on the way
        (1e-5, False, 50, 50),  # would need a million steps
        (30.0, False, 50, 50),  # the box holds it: to and fro for ever
    ],
)
def test_solves_of_a_restricted_level_end_at_rest_or_as_soon_as_it_is_far(
    lr, stationary, least, most, monkeypatch
):
    problem = BoxQP(num_upper=3, num_lower=6, condition=4)
    monkeypatch.delattr(BoxQP, "lower_solution")
    lower = Gradient(steps=1, optimizer=SGD(lr=lr))
    setup = Setup(problem=problem, lower=lower, upper=Upper(steps=1), estimator=FixedPoint())
    counted = itertools.count()
    solve = reference.solve
    monkeypatch.setattr(reference, "solve", lambda *a, **k: next(counted) * 0 or solve(*a, **k))
    assert CheckScenes(setup, 0.1).own.scene.stationary is stationary
    assert least <= next(counted) <= most


class RawRidge:
    """A ridge penalty a column of a regression that is not standardised: 1, age, income."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.A, self.b = self._drawn(g)
        self.C, self.d = self._drawn(g)

    def _drawn(self, g):
        age, income, noise = (torch.rand(200, generator=g, dtype=torch.float64) for _ in range(3))
        A = torch.stack([torch.ones_like(age), 20 + 40 * age, 3e4 + 4e4 * income], 1)
        return A, A @ A.new_tensor([5.0, 0.3, 2e-4]) + 3 * noise

    def init(self, stream):
        return {"p": torch.full((3,), -3.0)}, {"w": torch.zeros(3)}

    def upper_loss(self, x, y, batch):
        return (self.C @ y["w"] - self.d).square().mean()

    def lower_loss(self, x, y, batch):
        return ((self.A @ y["w"] - self.b).square().mean() + x["p"].exp() @ y["w"].square()) / 2

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def right(self, x):
        H = self.A.T @ self.A / 200 + x["p"].exp().diag()
        w = torch.linalg.solve(H, self.A.T @ self.b / 200)
        v = torch.linalg.solve(H, self.C.T @ (self.C @ w - self.d) / 100)
        assert torch.linalg.cond(H) > 1e10
        return -x["p"].exp() * w * v


def test_a_lower_level_that_is_flat_in_one_direction_is_solved_before_it_is_the_truth():
    """With y off by 1e-5 of ‖y‖ differences of Φ were off by 2e-3, and called what is right wrong."""
    problem = RawRidge()
    asked = Setup(problem, Newton(), Upper(steps=1), Implicit(), dtype=torch.float64)
    (row,) = [r for r in check(asked, {"implicit": Implicit()}) if isinstance(r, CheckRow)]
    assert (row.reference, row.verdict) == ("central differences", "exact")
    assert row.error < 1e-5
    scene = CheckScenes(asked, 0.1).own.scene
    truth = reference.reference_at(scene)
    assert truth.error({"p": problem.right(scene.x)}) < 1e-5


def test_where_the_lower_level_could_not_be_solved_again_differences_are_no_truth(monkeypatch):
    asked = Setup(RawRidge(), Newton(), Upper(steps=1), Implicit(), dtype=torch.float64)
    scene = CheckScenes(asked, 0.1).own.scene
    assert reference._differences_of_value(scene) is not None
    resolve = reference._resolve
    monkeypatch.setattr(reference, "_resolve", lambda *given: (resolve(*given)[0], False))
    assert reference._differences_of_value(scene) is None
