"""When the tight solve of a restricted lower level is given up."""

from __future__ import annotations

import itertools

import pytest

from bilevel.estimators.fixed_point import FixedPoint
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import reference
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
