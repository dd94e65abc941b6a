"""What every linear solver keeps: exactness, no growth, honest residuals, warm starts."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from tests.linear.systems import INDEFINITE, error, log_spectrum, system, zero

EPS = torch.finfo(torch.float64).eps


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
