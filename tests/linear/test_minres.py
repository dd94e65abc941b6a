"""MINRES: indefinite systems, and residuals that are true."""

import itertools

import pytest
import torch

from bilevel import tree
from bilevel.linear.cg import CG
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from tests.linear.systems import INDEFINITE, log_spectrum, system, zero


def test_cg_fails_where_minres_does_not():
    matvec, _, b = system(INDEFINITE, 0)
    assert CG(iterations=500).solve(matvec, b, zero(b)).stats.converged is False
    stats = MINRES(iterations=500).solve(matvec, b, zero(b)).stats
    assert stats.converged
    assert stats.curvature == pytest.approx(min(INDEFINITE), rel=1e-6)


def test_minres_needs_no_more_steps_than_unknowns_and_never_grows():
    matvec, _, b = system(INDEFINITE, 1)
    residuals = [
        MINRES(iterations=k, tolerance=0.0).solve(matvec, b, zero(b)).stats.residual
        for k in range(1, len(INDEFINITE) + 1)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(residuals))
    assert residuals[-1] < 1e-10 < 1e-4 < residuals[-2]


@pytest.mark.parametrize("make", [MINRES, GMRES], ids=lambda c: c.__name__)
def test_the_reported_residual_is_the_true_one(make):
    matvec, A, b = system(INDEFINITE, 2)
    solve = make(iterations=4).solve(matvec, b, zero(b))
    rhs = tree.flatten(b)
    true = float((rhs - A @ tree.flatten(solve.solution)).norm() / rhs.norm())
    assert solve.stats.residual == pytest.approx(true, rel=1e-9)


def test_minres_reports_no_residual_better_than_rounding_allows():
    """In float32, where the recursion falls for ever and the true residual does not."""
    matvec, A, b = system(log_spectrum(40, 1e5), 0, torch.float32)
    solve = MINRES(iterations=2000, tolerance=1e-7).solve(matvec, b, zero(b))
    rhs = tree.flatten(b).double()
    true = float((rhs - A.double() @ tree.flatten(solve.solution).double()).norm() / rhs.norm())
    assert true > 1e-6
    assert solve.stats.residual > 1e-6
    assert solve.stats.converged is False
