"""Conjugate gradient against direct solves, at tolerances derived from the conditioning."""

import math
import weakref

import numpy as np
import pytest
import torch

from bilevel import tree
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.lanczos import Tridiagonal
from bilevel.linear.neumann import Neumann
from tests.linear.systems import log_spectrum, system, zero


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_cg_and_dense_solve(condition, seed):
    matvec, A, b = system(log_spectrum(30, condition), seed)
    truth = torch.linalg.solve(A, tree.flatten(b))
    # rounding leaves ‖b − A v‖ near eps ‖A‖ ‖v‖ ≤ eps · condition · ‖b‖
    tolerance = max(1e-12, torch.finfo(torch.float64).eps * condition)
    for solver in (CG(iterations=2000, tolerance=tolerance), Dense()):
        solve = solver.solve(matvec, b, zero(b))
        error = float((tree.flatten(solve.solution) - truth).norm() / truth.norm())
        assert error <= condition * tolerance
        assert solve.stats.converged
        assert solve.stats.condition == pytest.approx(condition, rel=1e-2)


def test_cg_is_exact_in_as_many_steps_as_there_are_eigenvalues():
    spectrum = [1.0] * 10 + [3.0] * 10 + [7.0] * 10
    matvec, _, b = system(spectrum, 0)
    assert CG(iterations=3, tolerance=1e-10).solve(matvec, b, zero(b)).stats.converged
    assert not CG(iterations=2, tolerance=1e-10).solve(matvec, b, zero(b)).stats.converged


def test_cg_error_falls_at_the_chebyshev_rate():
    condition = 100.0
    matvec, A, b = system(log_spectrum(200, condition), 1)
    truth = torch.linalg.solve(A, tree.flatten(b))
    root = math.sqrt(condition)
    bound = (root - 1) / (root + 1)

    def energy(k):
        v = tree.flatten(CG(iterations=k, tolerance=0.0).solve(matvec, b, zero(b)).solution)
        return math.sqrt(float((v - truth) @ A @ (v - truth)))

    start = math.sqrt(float(truth @ A @ truth))
    for k in (5, 10, 20, 40):
        assert energy(k) <= 2 * bound**k * start


def test_a_cg_with_the_old_residual_would_fail_this_rate():
    """Negative control: the mistake two libraries ship, held to the bound above."""
    _, A, b = system(log_spectrum(200, 100.0), 1)
    rhs, truth = tree.flatten(b), torch.linalg.solve(A, tree.flatten(b))
    v, r, p = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    for _ in range(20):
        alpha = (r @ r) / (p @ A @ p)
        v, new = v + alpha * p, r - alpha * A @ p
        p, r = r + (new @ new) / (r @ r) * p, new  # old residual in the direction
    error = math.sqrt(float((v - truth) @ A @ (v - truth)))
    assert not error <= 2 * (9 / 11) ** 20 * math.sqrt(float(truth @ A @ truth))


@pytest.mark.parametrize("solver", [CG(), Neumann(), Dense()], ids=repr)
def test_a_zero_right_hand_side_gives_zero_from_any_start(solver):
    matvec, _, b = system([1.0, 2.0, 3.0], 0)
    solve = solver.solve(matvec, zero(b), b)
    assert tree.norm(solve.solution) == 0
    assert solve.stats.residual == 0


def test_a_budget_beyond_convergence_loses_nothing():
    matvec, A, b = system([1.0, 2.0, 3.0, 4.0], 0)
    solve = CG(iterations=10_000, tolerance=0.0).solve(matvec, b, zero(b))
    truth = torch.linalg.solve(A, tree.flatten(b))
    torch.testing.assert_close(tree.flatten(solve.solution), truth, rtol=1e-12, atol=1e-12)
    assert math.isfinite(solve.stats.residual)


def test_one_dimension():
    b = {"a": torch.tensor([6.0], dtype=torch.float64)}
    solve = CG().solve(lambda v: tree.scale(3.0, v), b, zero(b))
    assert solve.solution["a"].item() == pytest.approx(2.0, rel=1e-15)
    assert solve.stats.iterations == 1


@pytest.mark.parametrize("lowest", [-1.0, -1e-3])
def test_cg_reports_negative_curvature_and_does_not_claim_convergence(lowest):
    matvec, _, b = system([lowest, 1.0, 2.0, 3.0, 4.0], 0)
    stats = CG(iterations=50).solve(matvec, b, zero(b)).stats
    assert stats.curvature < 0
    assert stats.converged is False
    assert stats.condition is None  # not that of the positive Ritz values met before


def test_cg_on_a_singular_matrix_is_flagged():
    matvec, _, b = system([0.0, 1.0, 2.0, 3.0], 0)
    stats = CG(iterations=200, tolerance=1e-10).solve(matvec, b, zero(b)).stats
    assert stats.converged is False
    assert Dense().solve(matvec, b, zero(b)).stats.converged is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cg_does_not_run_off_along_entries_without_curvature(dtype):
    """Where A has rows of zeros p soon consists of them alone, and its step has no end."""
    matvec, _, b = system(log_spectrum(10, 1e3), 0, dtype)
    idle = torch.tensor([50.0, -70.0], dtype=dtype)

    def beside(v):
        return {**matvec({name: v[name] for name in b}), "idle": torch.zeros_like(idle)}

    right = {**b, "idle": idle}
    stats = CG(iterations=500, tolerance=1e-9).solve(beside, right, zero(right)).stats
    assert stats.converged is False
    assert math.isfinite(stats.residual)
    assert stats.iterations < 100


def test_a_warm_start_saves_products():
    matvec, _, b = system(log_spectrum(60, 1e3), 2)
    solver = CG(iterations=500, tolerance=1e-8)
    cold = solver.solve(matvec, b, zero(b))
    warm = solver.solve(matvec, b, tree.scale(1 + 1e-4, cold.solution))
    assert warm.stats.iterations < 0.7 * cold.stats.iterations
    assert solver.solve(matvec, b, cold.solution).stats.iterations == 0


def test_the_reported_residual_is_no_better_than_rounding_allows():
    """In float32 the recursion falls indefinitely; the true residual does not."""
    matvec, A, b = system(log_spectrum(40, 1e5), 0, torch.float32)
    solve = CG(iterations=2000, tolerance=1e-7).solve(matvec, b, zero(b))
    rhs = tree.flatten(b).double()
    true = float((rhs - A.double() @ tree.flatten(solve.solution).double()).norm() / rhs.norm())
    assert true > 1e-6
    assert 0.1 < solve.stats.residual / true < 10
    assert (solve.stats.stopped, solve.stats.converged) == ("rounding", True)


def test_the_direction_of_negative_curvature_is_not_followed():
    matvec, _, b = system([-1.0, 1.0, 2.0, 3.0, 4.0], 0)
    solve = CG(iterations=50, tolerance=0.0).solve(matvec, b, zero(b))
    steps = solve.stats.iterations
    assert 1 < steps < 50
    before = CG(iterations=steps - 1, tolerance=0.0).solve(matvec, b, zero(b)).solution
    assert torch.equal(tree.flatten(solve.solution), tree.flatten(before))


def test_cg_reports_the_smallest_curvature_that_it_met():
    """Against pᵀA p / pᵀp of the directions themselves; ‖p‖² is kept by recurrence."""
    matvec, _, b = system(log_spectrum(9, 100.0), 0)
    met = []

    def watched(p):
        product = matvec(p)
        met.append(tree.dot(p, product) / tree.dot(p, p))
        return product

    stats = CG(iterations=6, tolerance=0.0).solve(watched, b, zero(b)).stats
    assert min(met) < met[0] / 2  # the first direction, whose norm needs no recurrence, is not it
    # r is orthogonal to the old direction up to rounding, times the condition number
    assert stats.curvature == pytest.approx(min(met), rel=100 * 100 * 2.2e-16)


def test_cg_reports_it_through_a_preconditioner_too():
    """There M⁻¹ r is not orthogonal to the old direction, and ‖p‖² has to be taken anew."""
    matvec, A, b = system(log_spectrum(9, 100.0), 0)
    d, met = tree.unflatten(A.diagonal(), b), []

    def watched(p):
        product = matvec(p)
        met.append(tree.dot(p, product) / tree.dot(p, p))
        return product

    stats = (
        CG(iterations=6, tolerance=0.0)
        .solve(watched, b, zero(b), precondition=lambda r: tree.div(r, d))
        .stats
    )
    assert min(met) < met[0] / 2
    assert stats.curvature == pytest.approx(min(met), rel=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cg_takes_no_small_matrix_for_a_flat_one(size):
    matvec, A, b = system(log_spectrum(12, 100.0), 1)
    solve = CG(iterations=200, tolerance=1e-12).solve(
        lambda v: tree.scale(size, matvec(v)), b, zero(b)
    )
    assert solve.stats.converged
    truth = torch.linalg.solve(A, tree.flatten(b)) / size
    error = float((tree.flatten(solve.solution) - truth).norm() / truth.norm())
    assert error <= 100 * 1e-12


def test_cg_holds_one_product_at_a_time():
    matvec, _, b = system(log_spectrum(9, 100.0), 0)
    last: list[weakref.ref[torch.Tensor]] = []

    def watched(p):
        assert all(held() is None for held in last), "the product before this one is still held"
        product = tree.clone(matvec(p))
        last[:] = [weakref.ref(entry) for entry in product.values()]
        return product

    CG(iterations=5, tolerance=0.0).solve(watched, b, zero(b))
    assert last


def test_ritz_values_are_found_once_and_anew_after_a_step(monkeypatch):
    calls = []
    plain = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: (calls.append(1), plain(a))[1])
    matvec, _, b = system(log_spectrum(9, 100.0), 0)
    CG(iterations=5, tolerance=0.0).solve(matvec, b, zero(b))
    assert len(calls) == 1
    lanczos = Tridiagonal()
    lanczos.append(0.5, 0.0)
    assert lanczos.largest == 2.0
    lanczos.append(0.25, 0.0)
    assert lanczos.largest == 4.0
