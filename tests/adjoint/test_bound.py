"""The bound of known constants, by hand."""

import pytest
import torch

from bilevel.adjoint.bound import KnownBound
from bilevel.types import Solve, Stats

V = {"v": torch.tensor([3.0, 4.0])}
G_Y = {"y": torch.tensor([0.0, 7.0])}


@pytest.mark.parametrize(
    ("sensitivity", "bound", "source"),
    [(None, 5.4, "known constants, y taken as solved"), (6.0, 26.4, "known constants")],
)
def test_it_is_that_of_its_formula(sensitivity, bound, source):
    """4 (0.1 · 2 + 0.5 · 5) / 2 + 6 · 7 / 2."""
    known = KnownBound(damping=0.5, strong_convexity=2.0, cross_norm=4.0, sensitivity=sensitivity)
    stats = known.stats(Solve(V, Stats(residual=0.1)), 2.0, G_Y)
    assert stats.error_bound == pytest.approx(bound, rel=1e-12)
    assert stats.error_bound_from == source


def test_without_a_residual_there_is_none():
    known = KnownBound(damping=0.0, strong_convexity=2.0, cross_norm=4.0, sensitivity=None)
    assert known.stats(Solve(V, Stats()), 2.0, G_Y) == Stats()
