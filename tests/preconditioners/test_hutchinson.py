"""Hutchinson's estimate of the diagonal."""

import torch

from bilevel.preconditioners.hutchinson import Hutchinson
from bilevel.types import Point, System
from tests.adjoint.systems import seen_by
from tests.cases import PROBLEMS, closed_form

FRESH = Hutchinson().init(Point({}, {}))


def test_hutchinson_is_unbiased_for_the_diagonal():
    """Within four standard errors over 400 seeds; the variance is the one that is documented."""
    case = closed_form(PROBLEMS[0], 0)
    made, A = seen_by(case, damping=4.0)  # no estimate is negative, so its absolute value is itself
    draws = torch.stack(
        [
            1 / Hutchinson(probes=1, seed=seed).prepare(made, FRESH)[0](made.b)["y"]
            for seed in range(400)
        ]
    )
    off = A - A.diagonal().diag()
    spread = off.square().sum(1).sqrt()
    torch.testing.assert_close(draws.std(0), spread, rtol=0.2, atol=0)
    assert bool(((draws.mean(0) - A.diagonal()).abs() < 4 * spread / 400**0.5).all())
    assert bool(((draws.mean(0) - 1.1 * A.diagonal()).abs() > 4 * spread / 400**0.5).any())


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    d = torch.tensor([3.0, 0.5, 7.0], dtype=torch.float64)
    b = {"y": torch.ones(3, dtype=torch.float64)}
    made = System(lambda v: {"y": d * v["y"]}, b, None, None, 0.0, None)
    inverse, _ = Hutchinson(probes=1).prepare(made, FRESH)
    torch.testing.assert_close(inverse(b)["y"], 1 / d, rtol=1e-14, atol=0)


def diagonal_system(*entries):
    """(system, b) of a diagonal A, of which random signs find the diagonal exactly."""
    d = torch.tensor(entries, dtype=torch.float64)
    b = {"y": torch.ones(len(d), dtype=torch.float64)}
    return System(lambda v: {"y": d * v["y"]}, b, None, None, 0.0, None), b


def test_hutchinson_leaves_no_entry_below_its_floor():
    """The largest here is 0.5, so that a floor of 1e-3 of it is not 1e-3."""
    made, b = diagonal_system(0.5, -0.25, 1e-9, 0.0)
    inverse, _ = Hutchinson(probes=3, floor=1e-3).prepare(made, FRESH)
    expected = torch.tensor([2.0, 4.0, 2e3, 2e3], dtype=torch.float64)
    torch.testing.assert_close(inverse(b)["y"], expected, rtol=1e-12, atol=0)


def test_hutchinson_that_sees_no_curvature_is_the_identity():
    made, b = diagonal_system(0.0, 0.0)
    inverse, _ = Hutchinson().prepare(made, FRESH)
    assert torch.equal(inverse(b)["y"], b["y"])
