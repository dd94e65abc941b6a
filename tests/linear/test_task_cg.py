"""task_cg: one conjugate gradient a task in one product, and what it says where tasks are coupled."""

import math

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.task_cg import TaskCG, _dots
from bilevel.lower.newton import Newton
from bilevel.problem.over_tasks import OverTasks, at, stack
from bilevel.rng import Streams
from tests.cases import assert_close, relative
from tests.linear.systems import log_spectrum, system
from tests.problem.fits import Fit

CONDITIONS = [1.0, 3.0, 30.0, 1e3, 1e4]
EPS = torch.finfo(torch.float64).eps


def tasks(spectra, seed=0):
    """(product of all, the (product, b) of each), of tasks with these eigenvalues."""
    each = [system(spectrum, 100 * seed + i)[::2] for i, spectrum in enumerate(spectra)]

    def matvec(v):
        matvec.calls += 1
        return stack([product(at(v, i)) for i, (product, _) in enumerate(each)])

    matvec.calls = 0
    return matvec, each, stack([b for _, b in each])


def spread(seed=0, size=12):
    return tasks([log_spectrum(size, condition) for condition in CONDITIONS], seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_equals_conjugate_gradient_task_by_task(steps, seed):
    matvec, each, b = spread(seed)
    start = stack([tree.scale(0.1 * (i + 1), b_i) for i, (_, b_i) in enumerate(each)])
    for begin in (tree.zeros_like(b), start):
        got = TaskCG(iterations=steps, tolerance=1e-10).solve(matvec, b, begin).solution
        alone = [
            CG(iterations=steps, tolerance=1e-10).solve(product, b_i, at(begin, i)).solution
            for i, (product, b_i) in enumerate(each)
        ]
        assert_close(got, stack(alone), rtol=1e-9)
        together = CG(iterations=steps, tolerance=1e-10).solve(matvec, b, begin).solution
        with pytest.raises(AssertionError):  # negative control
            assert_close(together, stack(alone), rtol=1e-9)


def test_the_curvature_is_the_smallest_of_all_tasks():
    matvec, each, b = spread()
    alone = [CG(iterations=5).solve(A, b_i, tree.zeros_like(b_i)).stats for A, b_i in each]
    stats = TaskCG(iterations=5).solve(matvec, b, tree.zeros_like(b)).stats
    assert stats.curvature == pytest.approx(min(one.curvature for one in alone), rel=1e-9)


def test_needs_the_steps_of_the_worst_task_and_not_of_the_union():
    matvec, each, b = spread()
    zero, tolerance = tree.zeros_like(b), 1e-8
    alone = [
        CG(iterations=500, tolerance=tolerance).solve(A, b_i, tree.zeros_like(b_i)).stats
        for A, b_i in each
    ]
    stats = TaskCG(iterations=500, tolerance=tolerance).solve(matvec, b, zero).stats
    assert stats.converged
    assert stats.iterations == max(one.iterations for one in alone)
    assert matvec.calls == stats.iterations + 1  # and the true residual
    union = CG(iterations=500, tolerance=tolerance).solve(matvec, b, zero).stats
    assert union.converged
    assert union.iterations > 2 * stats.iterations


def test_solves_every_task_to_its_own_tolerance_whatever_its_scale():
    matvec, _, b = spread()
    scales = torch.logspace(-6, 6, len(CONDITIONS), dtype=torch.float64)
    b = tree.map(lambda entry: entry * scales[:, None], b)
    worst = {}
    for solver in (TaskCG(iterations=500), CG(iterations=500)):
        left = tree.sub(b, matvec(solver.solve(matvec, b, tree.zeros_like(b)).solution))
        worst[type(solver)] = max(tree.norm(at(left, i)) / tree.norm(at(b, i)) for i in range(5))
    assert worst[TaskCG] <= 2e-6
    assert worst[CG] > 0.1  # it has looked at the largest alone


def test_a_task_without_a_right_hand_side_stays_at_zero_from_any_start():
    matvec, _, b = spread()
    b = tree.map(lambda entry: entry.index_fill(0, torch.tensor(2), 0.0), b)
    for start in (tree.zeros_like(b), tree.map(torch.ones_like, b)):
        solve = TaskCG(iterations=100).solve(matvec, b, start)
        assert solve.stats.converged
        assert solve.stats.curvature > 0
        assert tree.norm(at(solve.solution, 2)) == 0
        assert tree.norm(at(solve.solution, 3)) > 0
    nothing = tree.zeros_like(b)
    solve = TaskCG().solve(matvec, nothing, b)
    assert tree.norm(solve.solution) == 0
    assert (solve.stats.iterations, solve.stats.residual, solve.stats.converged) == (0, 0.0, True)


def test_a_task_that_has_converged_stays_put():
    matvec, _, b = spread()
    solved = TaskCG(iterations=500, tolerance=1e-9).solve(matvec, b, tree.zeros_like(b)).solution
    start = tree.map(lambda entry: entry.clone(), solved)
    for entry in start.values():
        entry[4] = 0.0  # the one task that is left
    got = TaskCG(iterations=500, tolerance=1e-8).solve(matvec, b, start).solution
    for i in range(4):
        assert all(torch.equal(at(got, i)[name], at(start, i)[name]) for name in b)
    assert relative(at(got, 4), at(solved, 4)) < 1e-8 * CONDITIONS[4]


def test_an_indefinite_task_is_flagged_and_the_others_are_solved():
    matvec, each, b = tasks([[-1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    solve = TaskCG(iterations=50).solve(matvec, b, tree.zeros_like(b))
    assert solve.stats.converged is False
    assert solve.stats.curvature < 0
    left = tree.sub(at(b, 1), each[1][0](at(solve.solution, 1)))
    assert tree.norm(left) <= 1e-6 * tree.norm(at(b, 1))
    shared = CG(iterations=50).solve(matvec, b, tree.zeros_like(b)).solution
    left = tree.sub(at(b, 1), each[1][0](at(shared, 1)))
    assert tree.norm(left) > 1e-2 * tree.norm(at(b, 1))  # the bad task has stopped them all


@pytest.mark.parametrize("coupling", [0.1, 1e-8])
def test_coupled_tasks_are_not_called_converged(coupling):
    """A is no longer block diagonal: the recursive residual falls and the true one does not."""
    matvec, _, b = spread()

    def coupled(v):
        return tree.add(matvec(v), tree.map(lambda entry: coupling * entry.roll(1, 0), v))

    stats = TaskCG(iterations=100).solve(coupled, b, tree.zeros_like(b)).stats
    assert stats.converged is False
    assert stats.residual > 5e-6
    assert TaskCG(iterations=100).solve(matvec, b, tree.zeros_like(b)).stats.converged


def test_stops_at_its_budget_and_says_so():
    matvec, _, b = spread()
    stats = TaskCG(iterations=2).solve(matvec, b, tree.zeros_like(b)).stats
    assert (stats.iterations, stats.converged) == (2, False)
    assert stats.residual > 1e-6


def test_the_state_and_the_right_hand_side_are_left_alone():
    matvec, _, b = spread()
    start = tree.map(torch.ones_like, b)
    copies = tree.clone(b), tree.clone(start)
    TaskCG().solve(matvec, b, start)
    assert all(torch.equal(b[n], copies[0][n]) and torch.equal(start[n], copies[1][n]) for n in b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_keep_their_type(dtype):
    matvec, _, b = tasks([[1.0, 2.0, 3.0], [2.0, 2.0, 5.0]])
    narrow = tree.to(b, "cpu", dtype)

    def product(v):
        return tree.to(matvec(tree.to(v, "cpu", torch.float64)), "cpu", dtype)

    got = TaskCG(iterations=3).solve(product, narrow, tree.zeros_like(narrow)).solution
    exact = TaskCG(iterations=3).solve(matvec, b, tree.zeros_like(b)).solution
    assert {entry.dtype for entry in got.values()} == {dtype}
    assert relative(tree.to(got, "cpu", torch.float64), exact) < 50 * torch.finfo(dtype).eps


def test_sums_are_wider_than_narrow_entries():
    b = {"w": torch.full((2, 1000), 1.0078125, dtype=torch.bfloat16)}
    assert _dots(b, b).tolist() == pytest.approx([1000 * 1.0078125**2] * 2, rel=1e-6)


def test_entries_that_do_not_count_the_same_tasks_are_refused():
    for b in (
        {"w": torch.ones(3, 2), "c": torch.ones(4)},
        {"w": torch.ones(3, 2), "c": torch.ones(())},
        {"c": torch.ones(())},
    ):
        with pytest.raises(ProblemError, match="use solver: cg"):
            TaskCG().solve(lambda v: v, b, tree.zeros_like(b))


def test_a_product_that_is_not_finite_is_an_error():
    b = {"w": torch.ones(2, 3)}
    with pytest.raises(ConvergenceError, match="not finite"):
        TaskCG().solve(lambda v: tree.scale(math.inf, v), b, tree.zeros_like(b))


def test_many_tasks_equal_a_loop_over_them_with_fewer_products():
    problem = OverTasks(problem=Fit(), num_tasks=4)
    streams = Streams(0)
    x, y = problem.init(streams)
    lower, upper = next(problem.episodes(streams["episodes"]))
    y = solve_lower(problem.lower_loss, x, y, solver=Newton(), batch=lower).y

    def ask(solver, problem=problem, y=y, upper=upper, lower=lower):
        return hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            y,
            estimator=Implicit(solver=solver),
            upper_batch=upper,
            lower_batch=lower,
        )

    got = ask(TaskCG(iterations=50, tolerance=1e-11))
    one = Fit()
    loop = [
        ask(CG(iterations=50, tolerance=1e-11), one, at(y, i), at(upper, i), at(lower, i))
        for i in range(4)
    ]
    mean = {"x": torch.stack([part.hypergradient["x"] for part in loop]).mean(0)}
    assert_close(got.hypergradient, mean, rtol=1e-9)
    assert got.stats.converged
    assert got.stats.hvps == got.stats.iterations + 1
    assert got.stats.hvps < ask(CG(iterations=50, tolerance=1e-11)).stats.hvps


def test_the_residual_is_relative_to_all_right_hand_sides():
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = {"y": 100 * torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)}
    solve = TaskCG(iterations=1).solve(lambda v: {"y": v["y"] @ A}, b, tree.zeros_like(b))
    left = b["y"] - solve.solution["y"] @ A
    assert solve.stats.residual == pytest.approx(float(left.norm() / b["y"].norm()), rel=1e-12)
    assert solve.stats.residual > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_task_does_not_run_off_along_entries_without_curvature(dtype):
    """The first has rows of zeros in its block, where no step ends; the second is solved."""
    _, A, b = system(log_spectrum(10, 1e3), 0, dtype)
    blocks = torch.stack([A, A])
    blocks[0, 8:], blocks[0, :, 8:] = 0.0, 0.0
    right = {"y": torch.stack([50 * tree.flatten(b), tree.flatten(b)])}
    assert right["y"][0, 8:].all()
    solve = TaskCG(iterations=500, tolerance=1e-4).solve(
        lambda v: {"y": torch.einsum("tij,tj->ti", blocks, v["y"])}, right, tree.zeros_like(right)
    )
    assert solve.stats.converged is False
    assert math.isfinite(solve.stats.residual)
    truth = torch.linalg.solve(A.double(), tree.flatten(b).double())
    # the tolerance times the condition number
    assert float((solve.solution["y"][1] - truth).norm() / truth.norm()) <= 1e3 * 1e-4


@pytest.mark.parametrize("length", [1.0, 1e15])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tasks_are_not_flat_for_being_small(size, length):
    """Each is measured by its own curvature: one is 1e-30 or 1e30 times the other."""
    _, A, b = system(log_spectrum(10, 1e2), 0)
    blocks = torch.stack([A, size * A])
    right = {"y": torch.stack([length * tree.flatten(b), tree.flatten(b)])}
    solve = TaskCG(iterations=200, tolerance=1e-10).solve(
        lambda v: {"y": torch.einsum("tij,tj->ti", blocks, v["y"])}, right, tree.zeros_like(right)
    )
    assert solve.stats.converged
    truth = torch.linalg.solve(blocks, right["y"])
    errors = (solve.solution["y"] - truth).norm(dim=1) / truth.norm(dim=1)
    assert float(errors.max()) <= 1e2 * 1e-10


def test_a_small_task_beside_an_empty_one_keeps_its_start():
    _, A, b = system(log_spectrum(10, 1e2), 0)
    flat = 1e-3 * tree.flatten(b)
    right = {"y": torch.stack([torch.zeros_like(flat), flat])}
    start = {"y": torch.stack([torch.ones_like(flat), torch.linalg.solve(A, flat)])}
    solve = TaskCG(tolerance=1e-8).solve(lambda v: {"y": v["y"] @ A}, right, start)
    assert solve.stats.iterations == 0
    assert torch.equal(solve.solution["y"][0], right["y"][0])
    assert torch.equal(solve.solution["y"][1], start["y"][1])


def test_one_unknown_a_task_is_tight_too():
    b = {"y": torch.tensor([[6.0], [-3.0]], dtype=torch.float64)}
    solve = TaskCG().tight(1).solve(lambda v: tree.scale(3.0, v), b, tree.zeros_like(b))
    assert solve.stats.converged
    assert solve.solution["y"].flatten().tolist() == [2.0, -1.0]
