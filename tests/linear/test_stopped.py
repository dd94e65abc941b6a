"""Why a solve ended, and whether that counts as converged: against the true error, in both dtypes."""

import math

import pytest
import torch

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.guards import ended
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.task_cg import TaskCG
from tests.adjoint.systems import asked_of, quadratic_of
from tests.linear.systems import as_one_task, log_spectrum, system, zero

CONDITIONS = [30.0, 100.0, 1e3, 1e4]
ENOUGH = [
    CG(iterations=500),
    MINRES(iterations=500),
    GMRES(iterations=60, restart=60),
    Dense(),
    TaskCG(iterations=500),
]


def name(value):
    return type(value).__name__


def alone(solver, spectrum, seed=0, dtype=torch.float64):
    """(stats, true relative residual, relative error of v) of one solve from zero."""
    matvec, A, b = system(spectrum, seed, dtype)
    if isinstance(solver, TaskCG):  # one task of all unknowns
        matvec, b = as_one_task(matvec, b)

    solve = solver.solve(matvec, b, zero(b))
    v, rhs = tree.flatten(solve.solution).flatten().double(), tree.flatten(b).flatten().double()
    truth = torch.linalg.solve(A.double(), rhs)
    residual = float((rhs - A.double() @ v).norm() / rhs.norm())
    return solve.stats, residual, float((v - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("solver", ENOUGH, ids=name)
def test_what_the_dtype_can_attain_is_converged_and_right(solver, condition, dtype):
    """The default tolerance of 1e-6 is below eps · condition in float32."""
    for seed in range(3):
        stats, residual, error = alone(solver, log_spectrum(20, condition), seed, dtype)
        assert stats.converged
        assert stats.stopped in ("tolerance", "rounding")
        # of v: the tolerance, or rounding, times the condition number
        assert error <= condition * max(1e-6, torch.finfo(dtype).eps)
        if stats.stopped == "rounding":
            assert residual > 1e-7
            assert 0.1 < stats.residual / residual < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_default_estimate_is_not_flagged_where_it_is_right(condition, dtype):
    """Eight unknowns: 20 steps are enough; h is right to the figures of the issue or better."""
    for seed in range(5):
        problem = quadratic_of(log_spectrum(8, condition), seed, dtype)
        error, stats = asked_of(problem, Implicit())
        assert stats.converged
        assert stats.iterations < 20
        assert error <= max(1e-6, 30 * torch.finfo(dtype).eps * condition**0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.untrusted("what is flagged is its subject")
def test_what_is_not_converged_is_still_flagged(dtype):
    """Negative control: 20 steps for 30 unknowns at a condition number of 1e3."""
    for seed in range(5):
        problem = quadratic_of(log_spectrum(30, 1e3), seed, dtype)
        error, stats = asked_of(problem, Implicit())
        assert (stats.stopped, stats.converged) == ("iterations", False)
        assert error > 1e-3


@pytest.mark.untrusted("what is flagged is its subject")
def test_rounding_that_leaves_too_much_is_flagged():
    for seed in range(5):
        problem = quadratic_of(log_spectrum(30, 1e7), seed, torch.float32)
        error, stats = asked_of(problem, Implicit(solver=CG(iterations=2000)))
        assert (stats.stopped, stats.converged) == ("rounding", False)
        assert error > 1e-3


def test_a_solve_that_rounding_ends_takes_no_step_more():
    """The recursion goes on falling, at a product a step, until a tolerance that means nothing."""
    stats, _, _ = alone(CG(iterations=500), log_spectrum(8, 100.0), 0, torch.float32)
    assert stats.iterations <= 12


@pytest.mark.parametrize(
    ("solver", "stopped"),
    [
        (CG(iterations=3), "iterations"),
        (MINRES(iterations=3), "iterations"),
        (GMRES(iterations=3), "iterations"),
        (NormalCG(iterations=3), "iterations"),
        (Neumann(iterations=3, tolerance=1e-6), "iterations"),
        (TaskCG(iterations=3), "iterations"),
        (CG(iterations=3, tolerance=0.9), "tolerance"),
        (Neumann(iterations=500, tolerance=0.5, scale=1.0), "tolerance"),
        (GMRES(iterations=100, restart=1, tolerance=1e-12), "iterations"),
    ],
    ids=repr,
)
def test_a_budget_and_a_tolerance_are_told_apart(solver, stopped):
    stats, residual, _ = alone(solver, log_spectrum(12, 100.0))
    assert (stats.stopped, stats.converged) == (stopped, stopped == "tolerance")
    assert stats.residual == pytest.approx(residual, rel=1e-6)


@pytest.mark.parametrize(
    "solver",
    [MINRES(iterations=60), NormalCG(iterations=60), Dense()],
    ids=name,
)
def test_a_singular_system_stagnates_at_its_least_squares_solution(solver):
    stats, _, _ = alone(solver, [0.0, 1.0, 2.0, 3.0])
    assert (stats.stopped, stats.converged) == ("stagnation", False)


def test_watched_solves_end_when_they_are_asked_to():
    matvec, _, b = system(log_spectrum(12, 100.0), 0)
    stats = CG().solve(matvec, b, zero(b), stop=lambda progress: progress.steps == 4).stats
    assert (stats.iterations, stats.stopped, stats.converged) == (4, "asked", True)


def test_a_number_of_terms_is_no_tolerance():
    stats, _, _ = alone(Neumann(iterations=3), log_spectrum(12, 10.0))
    assert (stats.stopped, stats.converged) == ("iterations", None)


@pytest.mark.parametrize("solver", [Identity(), Nystrom()], ids=name)
def test_what_does_not_iterate_says_nothing(solver):
    stats, _, _ = alone(solver, log_spectrum(12, 10.0))
    assert (stats.stopped, stats.converged, stats.curvature) == (None, None, None)


def test_reasons_and_converged_agree():
    v = {"v": torch.zeros(1)}
    for stopped, residual, expected in [
        ("iterations", 1e-7, ("tolerance", True)),
        ("iterations", 1e-5, ("iterations", False)),
        ("tolerance", 1e-5, ("rounding", True)),
        ("tolerance", 0.011, ("rounding", False)),
        ("curvature", 1e-9, ("curvature", False)),
        ("stagnation", 1e-5, ("stagnation", False)),
        ("asked", 0.5, ("asked", True)),
    ]:
        stats = ended(stopped, residual, 1e-6, v)
        assert (stats.stopped, stats.converged) == expected
    assert ended("rounding", 0.08, 1e-6, {"v": torch.zeros(1, dtype=torch.bfloat16)}).converged


# a saddle ----------------------------------------------------------------------------------------

SADDLE = [-2.0, -0.5, -0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 4.0]


@pytest.mark.parametrize(
    "solver",
    [CG(), MINRES(), GMRES(), NormalCG(), TaskCG(), Dense()],
    ids=name,
)
def test_every_solver_has_evidence_of_a_saddle(solver):
    """Neumann diverges there, and says so; identity and nystrom look at nothing."""
    for seed in range(3):
        stats, _, _ = alone(solver, SADDLE, seed)
        assert stats.curvature < 0
        right, _, _ = alone(solver, [abs(value) for value in SADDLE], seed)
        assert right.curvature > 0  # negative control


def test_the_curvature_of_gmres_is_the_smallest_ritz_value():
    stats, _, _ = alone(GMRES(), SADDLE)
    assert stats.curvature == pytest.approx(-2.0, rel=1e-9)
    assert stats.converged


def test_the_evidence_costs_no_product():
    matvec, _, b = system(SADDLE, 0)
    calls = []

    def counted(v):
        calls.append(1)
        return matvec(v)

    gmres = GMRES().solve(counted, b, zero(b)).stats
    assert len(calls) == gmres.iterations
    calls.clear()
    normal = NormalCG().solve(counted, b, zero(b)).stats
    assert len(calls) == 2 * normal.iterations + 2


# messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"), [(math.nan, "'b' that are NaN"), (math.inf, "'b' that are infinite")]
)
@pytest.mark.parametrize("solver", [CG(), MINRES(), GMRES(), Neumann(), Dense()], ids=name)
def test_a_right_hand_side_that_is_no_number_is_named(solver, bad, said):
    matvec, _, b = system(log_spectrum(6, 10.0), 0)
    b["b"][1] = bad
    with pytest.raises(ConvergenceError, match=said):
        solver.solve(matvec, b, zero(b))


@pytest.mark.parametrize(("size", "said"), [(1e200, "so large"), (1e-200, "so small")])
def test_squares_that_are_no_number_are_said_to_be(size, said):
    matvec, _, b = system(log_spectrum(6, 10.0), 0)
    with pytest.raises(ConvergenceError, match=rf"{said}.*; scale upper_loss$"):
        CG().solve(matvec, tree.scale(size, b), zero(b))


def test_float64_is_no_remedy_in_float64():
    for dtype, said in ((torch.float64, False), (torch.float32, True)):
        b = {"w": torch.ones(3, dtype=dtype)}
        with pytest.raises(ConvergenceError, match="not finite") as caught:
            CG().solve(lambda v: tree.scale(math.nan, v), b, zero(b))
        assert ("float64" in str(caught.value)) is said
