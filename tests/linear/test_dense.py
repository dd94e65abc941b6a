"""The dense solve: what it refuses, and what it reports of a matrix."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.linear.dense import Dense
from tests.linear.systems import system, zero


def test_dense_refuses_what_does_not_fit():
    b = {"a": torch.zeros(20)}
    with pytest.raises(ProblemError, match=r"20 x 20.*limit = 10"):
        Dense(limit=10).solve(lambda v: v, b, b)


def test_dense_solves_what_is_not_symmetric_positive_definite():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    b = {"a": torch.randn(6, generator=generator, dtype=torch.float64)}
    solve = Dense().solve(lambda v: {"a": A @ v["a"]}, b, zero(b))
    torch.testing.assert_close(A @ solve.solution["a"], b["a"], rtol=1e-10, atol=1e-10)


def test_dense_reports_the_smallest_eigenvalue():
    matvec, _, b = system([-0.5, 1.0, 2.0], 0)
    assert Dense().solve(matvec, b, zero(b)).stats.curvature == pytest.approx(-0.5, rel=1e-9)


def test_dense_reports_what_a_singular_matrix_leaves():
    """Least squares leaves of b what lies outside the range."""
    diagonal = {"a": torch.tensor([2.0, 5.0, 0.0], dtype=torch.float64)}
    b = {"a": torch.tensor([2.0, 5.0, 3.0], dtype=torch.float64)}
    solve = Dense().solve(lambda v: tree.mul(diagonal, v), b, zero(b))
    expected = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(solve.solution["a"], expected, rtol=1e-14, atol=1e-14)
    assert solve.stats.residual == pytest.approx(3 / math.sqrt(4 + 25 + 9), rel=1e-12)
    regular = Dense().solve(lambda v: tree.scale(2.0, v), b, zero(b)).stats
    assert regular.residual <= 4 * torch.finfo(torch.float64).eps
