"""MINRES, GMRES, normal CG, identity and Nyström: exactness, rates, and what they must flag."""

import itertools
import math

import pytest
import torch

from bilevel import tree
from bilevel.linear.cg import CG
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from tests.linear.test_linear import log_spectrum, system, zero

INDEFINITE = [-2.0, -0.5, -0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 4.0]
EPS = torch.finfo(torch.float64).eps


def error(solve, A, b):
    truth = torch.linalg.solve(A, tree.flatten(b))
    return float((tree.flatten(solve.solution) - truth).norm() / truth.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", [INDEFINITE, log_spectrum(30, 1e3)], ids=["indefinite", "1e3"])
@pytest.mark.parametrize("make", [MINRES, GMRES, NormalCG], ids=lambda c: c.__name__)
def test_solves_symmetric_systems(make, spectrum, seed):
    matvec, A, b = system(spectrum, seed)
    options = {"restart": 40} if make is GMRES else {}
    condition = float(torch.linalg.cond(A))
    tolerance = max(1e-12, 10 * EPS * condition ** (2 if make is NormalCG else 1))
    solve = make(iterations=2000, tolerance=tolerance, **options).solve(matvec, b, zero(b))
    assert solve.stats.converged
    assert error(solve, A, b) <= condition * tolerance
    few = make(iterations=2, tolerance=tolerance, **options).solve(matvec, b, zero(b))
    assert few.stats.converged is False
    assert error(few, A, b) > 1e-3


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


def test_a_neumann_series_needs_no_symmetry():
    generator = torch.Generator().manual_seed(3)
    M = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    A = torch.eye(10, dtype=torch.float64) - 0.5 * M / torch.linalg.matrix_norm(M, 2)
    b = {"a": torch.randn(10, generator=generator, dtype=torch.float64)}
    solver = Neumann(iterations=200, scale=1.0, tolerance=1e-12)
    assert error(solver.solve(lambda v: {"a": A @ v["a"]}, b, zero(b)), A, b) < 1e-10


@pytest.mark.parametrize(
    "solver",
    [MINRES(), GMRES(), NormalCG(), Identity(), Nystrom()],
    ids=lambda s: type(s).__name__,
)
def test_zero_right_hand_sides_and_one_dimension(solver):
    matvec, _, b = system([1.0, 2.0, 3.0], 0)
    assert tree.norm(solver.solve(matvec, zero(b), b).solution) == 0
    one = {"a": torch.tensor([6.0], dtype=torch.float64)}
    got = solver.solve(lambda v: tree.scale(3.0, v), one, zero(one)).solution["a"].item()
    expected = {"Identity": 6.0, "Nystrom": 6 / 3.01}.get(type(solver).__name__, 2.0)
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [MINRES, GMRES], ids=lambda c: c.__name__)
def test_a_budget_beyond_convergence_loses_nothing(make):
    options = {"restart": 50} if make is GMRES else {}
    matvec, A, b = system(INDEFINITE, 3)
    solve = make(iterations=500, tolerance=0.0, **options).solve(matvec, b, zero(b))
    assert error(solve, A, b) < 1e-11
    assert math.isfinite(solve.stats.residual)


@pytest.mark.parametrize("make", [MINRES, GMRES, NormalCG], ids=lambda c: c.__name__)
def test_singular_systems_are_flagged_unless_they_can_be_solved(make):
    matvec, A, b = system([0.0, 1.0, 2.0, 3.0], 0)
    solver = make(iterations=60, tolerance=1e-8)
    assert solver.solve(matvec, b, zero(b)).stats.converged is False
    inside = matvec(b)
    solve = solver.solve(matvec, inside, zero(b))
    assert solve.stats.converged
    left = tree.flatten(inside) - A @ tree.flatten(solve.solution)
    assert float(left.norm()) <= 1e-7 * tree.norm(inside)


@pytest.mark.parametrize("make", [MINRES, GMRES], ids=lambda c: c.__name__)
def test_warm_starts_save_products(make):
    matvec, _, b = system(log_spectrum(40, 1e2), 2)
    options = {"restart": 60} if make is GMRES else {}
    solver = make(iterations=300, tolerance=1e-8, **options)
    cold = solver.solve(matvec, b, zero(b))
    warm = solver.solve(matvec, b, tree.scale(1 + 1e-5, cold.solution))
    assert warm.stats.iterations < 0.75 * cold.stats.iterations
    assert warm.stats.converged


def test_identity_keeps_an_acute_angle_on_a_contraction():
    matvec, A, b = system([0.6, 0.8, 1.0, 1.2, 1.4], 0)
    truth = torch.linalg.solve(A, tree.flatten(b))
    got = tree.flatten(Identity().solve(matvec, b, zero(b)).solution)
    assert float(got @ truth) / float(got.norm() * truth.norm()) > 0.9
    first = Neumann(iterations=1, scale=0.7).solve(matvec, b, zero(b)).solution
    scaled = Identity(scale=0.7).solve(matvec, b, zero(b)).solution
    torch.testing.assert_close(tree.flatten(scaled), tree.flatten(first))


def test_nystrom_is_exact_at_full_rank_and_improves_with_rank():
    """A Hessian of rank 5 in 20 dimensions, damped: 5 random columns already span it."""
    spectrum = [0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 5.0]
    matvec, A, b = system(spectrum, 1)
    rho = 0.1
    truth = torch.linalg.solve(A + rho * torch.eye(20, dtype=torch.float64), tree.flatten(b))

    def off(rank):
        got = tree.flatten(Nystrom(rank=rank, rho=rho).solve(matvec, b, zero(b)).solution)
        return float((got - truth).norm() / truth.norm())

    assert off(20) < 1e-9
    assert off(5) < 1e-8
    assert off(4) > 1e-3  # control: one column short
    assert off(2) > off(4)


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


def test_minres_reports_no_residual_better_than_rounding_allows():
    """In float32, where the recursion falls for ever and the true residual does not."""
    matvec, A, b = system(log_spectrum(40, 1e5), 0, torch.float32)
    solve = MINRES(iterations=2000, tolerance=1e-7).solve(matvec, b, zero(b))
    rhs = tree.flatten(b).double()
    true = float((rhs - A.double() @ tree.flatten(solve.solution).double()).norm() / rhs.norm())
    assert true > 1e-6
    assert solve.stats.residual > 1e-6
    assert solve.stats.converged is False


@pytest.mark.parametrize(
    "solver", [NormalCG(iterations=3), Nystrom(rank=3)], ids=lambda s: type(s).__name__
)
def test_the_residual_is_that_of_the_system_and_relative(solver):
    matvec, A, b = system(log_spectrum(12, 30.0), 2)
    for size in (1.0, 1e3):
        right = tree.scale(size, b)
        solve = solver.solve(matvec, right, zero(b))
        rhs = tree.flatten(right)
        true = float((rhs - A @ tree.flatten(solve.solution)).norm() / rhs.norm())
        assert true > 1e-3
        assert solve.stats.residual == pytest.approx(true, rel=1e-9)


def test_nothing_to_solve_is_solved():
    matvec, _, b = system([1.0, 2.0, 3.0], 0)
    for solver in (Nystrom(), NormalCG(), MINRES(), GMRES()):
        stats = solver.solve(matvec, zero(b), zero(b)).stats
        assert (stats.residual, stats.converged) == (0.0, True)


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_normal_cg_is_tight_in_any_dimension(dim):
    matvec, A, b = system(log_spectrum(dim, 30.0), 0)
    solve = NormalCG().tight(dim).solve(matvec, b, zero(b))
    assert solve.stats.converged
    assert error(solve, A, b) <= 30.0 * 1e-10
