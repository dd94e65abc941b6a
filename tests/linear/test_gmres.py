"""GMRES and normal CG: systems without symmetry."""

import pytest
import torch

from bilevel import tree
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.normal_cg import NormalCG
from tests.linear.systems import error, log_spectrum, system, zero


@pytest.mark.parametrize("seed", range(3))
def test_gmres_solves_what_is_not_symmetric(seed):
    """A contraction's I − Mᵀ with M of no symmetry; MINRES and CG go wrong on it, and can be told."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(25, 25, generator=generator, dtype=torch.float64)
    A = torch.eye(25, dtype=torch.float64) - 0.9 * M / torch.linalg.matrix_norm(M, 2)
    b = {"a": torch.randn(25, generator=generator, dtype=torch.float64)}
    apply = lambda v: {"a": A @ v["a"]}  # noqa: E731
    solve = GMRES(iterations=25, restart=25, tolerance=1e-10).solve(apply, b, zero(b))
    assert solve.stats.converged
    assert error(solve, A, b) < 1e-8
    restarted = GMRES(iterations=400, restart=6, tolerance=1e-10).solve(apply, b, zero(b))
    assert restarted.stats.converged
    assert error(restarted, A, b) < 1e-8
    assert error(MINRES(iterations=25, tolerance=0.0).solve(apply, b, zero(b)), A, b) > 1e-4


def shift(n):
    """(product with A, A, b) for the cyclic shift, in which no Krylov space shorter than n helps."""
    A = torch.eye(n, dtype=torch.float64).roll(1, dims=0)
    b = torch.zeros(n, dtype=torch.float64)
    b[0] = 1.0
    return lambda v: {"a": A @ v["a"]}, A, {"a": b}


def test_gmres_is_tight_at_as_many_steps_as_there_are_unknowns():
    matvec, A, b = shift(130)
    solve = GMRES().tight(130).solve(matvec, b, zero(b))
    assert solve.stats.converged
    assert solve.stats.iterations == 130
    assert error(solve, A, b) < 1e-11


def test_gmres_gives_up_where_a_whole_cycle_gains_nothing():
    matvec, _, b = shift(12)
    for size in (1.0, 1e-2):
        right = tree.scale(size, b)
        stats = GMRES(iterations=1000, restart=5).solve(matvec, right, zero(b)).stats
        assert (stats.iterations, stats.residual, stats.converged) == (5, 1.0, False)


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_normal_cg_is_tight_in_any_dimension(dim):
    matvec, A, b = system(log_spectrum(dim, 30.0), 0)
    solve = NormalCG().tight(dim).solve(matvec, b, zero(b))
    assert solve.stats.converged
    assert error(solve, A, b) <= 30.0 * 1e-10
