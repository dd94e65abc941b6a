"""The Neumann series: its terms, its rate, and how it tells that it diverges."""

import pytest
import torch

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.linear.neumann import Neumann
from tests.linear.systems import error, system, zero


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.2])
def test_neumann_error_ratio_is_the_norm_of_the_iteration(scale):
    spectrum = [0.3, 0.5, 0.8, 1.0, 1.5]
    matvec, A, b = system(spectrum, 4)
    truth = torch.linalg.solve(A, tree.flatten(b))
    ratio = max(abs(1 - scale * s) for s in spectrum)

    def error(k):
        solution = Neumann(iterations=k, scale=scale).solve(matvec, b, zero(b)).solution
        return float((tree.flatten(solution) - truth).norm())

    far, further = (60, 90) if ratio > 0.7 else (20, 30)
    slope = (error(further) / error(far)) ** (1 / (further - far))
    assert slope == pytest.approx(ratio, rel=0.01)
    assert slope != pytest.approx(ratio**2, rel=0.01)  # control: the slope is told apart


def test_neumann_equals_its_series():
    matvec, A, b = system([0.3, 0.9, 1.4], 5)
    rhs, M = tree.flatten(b), torch.eye(3, dtype=torch.float64) - 0.7 * A
    series = sum(0.7 * torch.linalg.matrix_power(M, k) @ rhs for k in range(8))
    got = tree.flatten(Neumann(iterations=8, scale=0.7).solve(matvec, b, zero(b)).solution)
    torch.testing.assert_close(got, series, rtol=1e-13, atol=1e-13)


def test_neumann_continues_from_a_warm_start():
    matvec, _, b = system([0.3, 0.9, 1.4], 5)
    once = Neumann(iterations=5, scale=0.7).solve(matvec, b, zero(b)).solution
    twice = Neumann(iterations=5, scale=0.7).solve(matvec, b, once).solution
    whole = Neumann(iterations=10, scale=0.7).solve(matvec, b, zero(b)).solution
    torch.testing.assert_close(tree.flatten(twice), tree.flatten(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spectrum", [[1.0, 30.0], [-0.5, 1.0]], ids=["too long", "indefinite"])
def test_neumann_recognises_divergence_with_the_remedy(spectrum):
    matvec, _, b = system([*spectrum, 1.0], 0)
    calls = []

    def counting(v):
        calls.append(1)
        return matvec(v)

    with pytest.raises(ConvergenceError, match=r"diverges.*lower `scale`.*damping"):
        Neumann(iterations=1000, scale=0.5).solve(counting, b, zero(b))
    assert len(calls) < 30


def test_neumann_names_a_scale_that_converges():
    matvec, _, b = system([1.0, 30.0, 2.0], 0)
    with pytest.raises(ConvergenceError) as caught:
        Neumann(iterations=1000, scale=0.5).solve(matvec, b, zero(b))
    named = float(str(caught.value).split("lower `scale` to ")[1].split(" ")[0])
    solve = Neumann(iterations=3000, scale=named).solve(matvec, b, zero(b))
    assert solve.stats.residual < 1e-8


def test_neumann_reports_the_true_residual_and_the_smallest_curvature_met():
    matvec, A, b = system([0.2, 0.9, 1.4], 5)
    solve = Neumann(iterations=3, scale=0.5).solve(matvec, b, zero(b))
    rhs = tree.flatten(b)
    true = float((rhs - A @ tree.flatten(solve.solution)).norm() / rhs.norm())
    assert solve.stats.residual == pytest.approx(true, rel=1e-12)
    r, lowest = rhs, []
    for _ in range(3):
        lowest.append(float(r @ A @ r / (r @ r)))
        r = r - 0.5 * A @ r
    assert solve.stats.curvature == pytest.approx(min(lowest), rel=1e-12)


def test_neumann_stops_at_the_third_growth_in_a_row_and_not_before():
    """I − A nilpotent: its powers times b grow twice and are then gone, or grow for ever."""
    for last, ends in ((0.0, True), (2.0, False)):
        N = torch.tensor([[0, 2, 0], [0, 0, 2], [last, 0, 0]], dtype=torch.float64)
        b = {"a": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)}
        calls = []

        def matvec(v, N=N, calls=calls):
            calls.append(1)
            return {"a": v["a"] - N @ v["a"]}

        solver = Neumann(iterations=50, scale=1.0, tolerance=1e-12)
        if ends:
            solve = solver.solve(matvec, b, zero(b))
            assert solve.stats.iterations == 3
            assert solve.solution["a"].tolist() == [4.0, 2.0, 1.0]
            continue
        with pytest.raises(ConvergenceError, match="term 3 is 2 times"):
            solver.solve(matvec, b, zero(b))
        assert len(calls) == 3


def test_the_terms_of_neumann_are_as_many_whatever_the_size_of_b():
    matvec, _, b = system([0.3, 0.9, 1.4], 5)
    solver = Neumann(iterations=500, scale=0.7, tolerance=1e-6)
    counts = {
        solver.solve(matvec, tree.scale(size, b), zero(b)).stats.iterations
        for size in (1e-3, 1.0, 1e3)
    }
    assert len(counts) == 1


def test_a_neumann_series_needs_no_symmetry():
    generator = torch.Generator().manual_seed(3)
    M = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    A = torch.eye(10, dtype=torch.float64) - 0.5 * M / torch.linalg.matrix_norm(M, 2)
    b = {"a": torch.randn(10, generator=generator, dtype=torch.float64)}
    solver = Neumann(iterations=200, scale=1.0, tolerance=1e-12)
    assert error(solver.solve(lambda v: {"a": A @ v["a"]}, b, zero(b)), A, b) < 1e-10
