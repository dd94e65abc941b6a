"""Starts of an adjoint solve from the adjoints before it."""

import pytest
import torch

from bilevel import calculus, tree
from bilevel.adjoint.starts import begin, with_cached_product
from bilevel.estimators.implicit import Implicit
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.task_cg import TaskCG
from bilevel.preconditioners.none import Nothing
from bilevel.rng import stream
from bilevel.types import Point, Solve, Stats
from bilevel_problems.logistic import Logistic
from tests.benchmarks.products import cold_products, run_of
from tests.cases import PROBLEMS, assert_close, closed_form
from tests.linear.systems import log_spectrum, system, zero


def past_of(b, count, seed=0):
    generator = stream(seed, "past")
    v = tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), b)
    moves = tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), b)
    return [tree.axpy(0.1 * k + 0.01 * k * k, moves, v) for k in range(count)]


def test_starts_are_their_formulas():
    matvec, _, b = system(log_spectrum(12, 10), 0)
    past = past_of(b, 3)
    v, product = begin("cold", matvec, b, past)
    assert tree.norm(v) == 0
    assert product is None
    assert begin("warm", matvec, b, past)[0] is past[-1]
    assert_close(
        begin("linear", matvec, b, past)[0],
        tree.axpy(-1.0, past[1], tree.scale(2.0, past[2])),
        1e-14,
    )
    for kind in ("warm", "linear", "galerkin"):
        assert tree.norm(begin(kind, matvec, b, [])[0]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_galerkin_is_nearest_of_all_in_the_norm_of_the_matrix(seed):
    matvec, A, b = system(log_spectrum(12, 1e3), seed)
    truth = tree.unflatten(torch.linalg.solve(A, tree.flatten(b)), b)
    past = past_of(b, 3, seed)

    def far(v):
        off = tree.sub(v, truth)
        return tree.dot(off, matvec(off))

    v, product = begin("galerkin", matvec, b, past)
    assert product is not None
    assert_close(product, matvec(v), rtol=1e-9)
    V = torch.stack([tree.flatten(p) for p in past], dim=1)
    best = V @ torch.linalg.solve(V.T @ A @ V, V.T @ tree.flatten(b))
    assert_close(v, tree.unflatten(best, b), rtol=1e-6)
    others = [zero(b), past[-1], begin("linear", matvec, b, past)[0]]
    assert all(far(v) <= far(other) * (1 + 1e-9) for other in others)


def test_galerkin_finds_what_lies_in_the_span():
    matvec, A, b = system(log_spectrum(12, 1e3), 0)
    truth = tree.unflatten(torch.linalg.solve(A, tree.flatten(b)), b)
    first, second = past_of(b, 2)
    third = tree.axpy(0.3, first, tree.axpy(-1.7, second, truth))
    v, _ = begin("galerkin", matvec, b, [first, second, third])
    assert_close(v, truth, rtol=1e-8)


class Elsewhere:
    """A solver written against the protocol alone: three Richardson steps."""

    in_place = False

    def solve(self, matvec, b, start):
        v = start
        if self.in_place:  # what is told is the product at the start as it was
            tree.axpy_(v, 0.3, b)
        for _ in range(3):
            v = tree.axpy(0.05, tree.sub(b, matvec(v)), v)
        return Solve(v, Stats(iterations=3))


class InPlace(Elsewhere):
    in_place = True


# products that a solve takes beyond its iterations, where the start is not zero
BEYOND = [
    (MINRES(iterations=3, tolerance=0.0), 1 + 1),
    (GMRES(iterations=3, tolerance=0.0), 1),
    (Neumann(iterations=3, scale=0.05), 1),
    (NormalCG(iterations=3, tolerance=0.0), 3 + 1 + 2 + 1),  # A² a step, A b, A² v, b − A v
    (TaskCG(iterations=3, tolerance=0.0), 1 + 1),
    (Elsewhere(), 0),
]


def started_at(start, solver, count=3):
    """An estimate with three adjoints of the past, which span nothing of the present one."""
    case = closed_form(PROBLEMS[0], 0)
    estimator = Implicit(solver=solver, start=start)
    state = estimator.init(Point(case.x, case.y)) | {"past": past_of(case.y, count)}
    return case.estimate(estimator, state=state), case


@pytest.mark.parametrize(("solver", "beyond"), BEYOND, ids=lambda value: type(value).__name__)
@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_a_galerkin_start_costs_one_product_for_each_adjoint_and_no_other(solver, beyond):
    warm, _ = started_at("warm", solver)
    assert warm.stats.hvps == warm.stats.iterations + beyond
    galerkin, _ = started_at("galerkin", solver)
    assert galerkin.stats.hvps == galerkin.stats.iterations + beyond - 1 + 3


@pytest.mark.parametrize(
    "solver", [*(s for s, _ in BEYOND), InPlace()], ids=lambda s: type(s).__name__
)
@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_what_a_solver_is_told_is_the_product_it_would_have_taken(solver):
    got, case = started_at("galerkin", solver)
    A, b = case.hessian(), case.y
    F_y = calculus.gradients(case.losses().upper, Point(case.x, case.y))[2]

    def matvec(v):
        return tree.unflatten(A @ tree.flatten(v), v)

    start, _ = begin("galerkin", matvec, F_y, past_of(b, 3))
    expected = solver.solve(matvec, F_y, start).solution
    assert_close(got.state["past"][-1], expected, rtol=1e-10)


def test_a_product_is_told_for_the_very_tensors_only():
    matvec, _, b = system(log_spectrum(12, 10), 0)
    v, asked = tree.clone(b), []
    told = with_cached_product(lambda u: asked.append(u) or matvec(u), v, tree.scale(7.0, b))
    first = told(v)
    assert_close(first, tree.scale(7.0, b), 1e-15)
    tree.scale_(first, 0.0)  # the caller's own
    assert_close(told(v), tree.scale(7.0, b), 1e-15)
    assert not asked
    told(tree.clone(v))
    tree.axpy_(v, 1.0, b)
    assert_close(told(v), matvec(v), 1e-15)
    assert len(asked) == 2


def test_an_eighth_of_the_products_of_cold_conjugate_gradient():
    """Cold CG stopped by the truth itself; ours by what it can know, all it spends counted."""
    problem = Logistic(data="synthetic", num_features=60, spread=300.0, initial_log_penalty=-12.0)
    points = run_of(problem, 25)
    conditions = [point.condition for point in points]
    assert min(conditions) > 1e4
    errors, spent = run_with(points, Implicit(target_error=1e-3))
    assert max(errors) <= 1e-3
    assert 8 * spent <= cold_products(points, 1e-3)
    errors, warm = run_with(
        points, Implicit(target_error=1e-3, start="cold", preconditioner=Nothing())
    )
    assert 8 * warm > cold_products(points, 1e-3), "negative control: without them it is not"


def run_with(points, estimator):
    from tests.benchmarks.products import along

    found = along(points, estimator)
    return [error for error, _ in found], sum(spent for _, spent in found)
