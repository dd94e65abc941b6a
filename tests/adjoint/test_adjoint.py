"""Fewer products: preconditioners, starts, the stopping rule, the bound of the error."""

import gc
import itertools
import math
from dataclasses import replace

import pydantic
import pytest
import torch

from bilevel import calculus, hypergradient, tree
from bilevel.adjoint.starts import begin, known
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG, Sample
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.task_cg import TaskCG
from bilevel.preconditioners.diagonal import Diagonal
from bilevel.preconditioners.hutchinson import Hutchinson
from bilevel.preconditioners.none import Nothing
from bilevel.preconditioners.nystrom import Nystrom
from bilevel.preconditioners.rebuild import RebuildRule
from bilevel.preconditioners.recycled import Recycled
from bilevel.rng import stream
from bilevel.types import Counts, Loss, Losses, Point, Solve, Stats, System
from bilevel_problems.logistic import Logistic
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge import Ridge
from tests.benchmarks.products import cold_products, run_of, walk
from tests.cases import PROBLEMS, assert_close, closed_form, relative
from tests.linear.test_linear import log_spectrum, run_cg, system, zero

# conjugate gradient with what a caller knows -----------------------------------------------------


def inverse_of(A, like):
    return lambda r: tree.unflatten(torch.linalg.solve(A, tree.flatten(r)), like)


def test_the_true_inverse_leaves_one_step():
    matvec, A, b = system(log_spectrum(30, 1e6), 0)
    exact = run_cg(CG(iterations=50, tolerance=1e-10), matvec, b, precondition=inverse_of(A, b))
    assert exact.stats.iterations == 1
    assert exact.stats.converged
    assert CG(iterations=50, tolerance=1e-10).solve(matvec, b, zero(b)).stats.iterations > 30


@pytest.mark.parametrize("seed", range(3))
def test_a_preconditioner_changes_the_way_and_not_the_end(seed):
    matvec, A, b = system(log_spectrum(40, 1e4), seed)
    truth = torch.linalg.solve(A, tree.flatten(b))
    d = tree.unflatten(A.diagonal(), b)
    got = run_cg(
        CG(iterations=500, tolerance=1e-11), matvec, b, precondition=lambda r: tree.div(r, d)
    )
    error = float((tree.flatten(got.solution) - truth).norm() / truth.norm())
    assert error <= 1e4 * 1e-11
    scaled = A / torch.outer(A.diagonal(), A.diagonal()).sqrt()
    values = torch.linalg.eigvalsh(scaled)
    assert got.stats.condition == pytest.approx(float(values[-1] / values[0]), rel=0.02)


def test_an_indefinite_matrix_is_seen_through_a_preconditioner():
    matvec, _, b = system([-0.5, *log_spectrum(20, 10)], 0)
    d = tree.map(lambda p: torch.full_like(p, 2.0), b)
    got = run_cg(CG(iterations=100), matvec, b, precondition=lambda r: tree.div(r, d))
    assert got.stats.curvature <= 0
    assert got.stats.converged is False
    assert tree.is_finite(got.solution)


def test_the_energy_of_the_steps_is_the_distance_they_went():
    """Hestenes and Stiefel (1952), thm. 6:1: ‖v_k − v_j‖² in the norm of A, at no product."""
    matvec, _, b = system(log_spectrum(20, 100), 1)
    seen = []

    def look(progress):
        if progress.steps in (3, 9):
            seen.append((tree.clone(progress.v), progress))
        if progress.steps == 9:
            move = tree.sub(seen[1][0], seen[0][0])
            true = tree.dot(move, matvec(move))
            assert progress.energy(3) == pytest.approx(true, rel=1e-9)
            assert progress.energy(4) != pytest.approx(true, rel=1e-2)
        return progress.steps == 9

    run_cg(CG(iterations=50, tolerance=0.0), matvec, b, enough=look)
    assert len(seen) == 2


@pytest.mark.parametrize("steps", [3, 16, 50])
def test_a_sample_is_even_and_no_larger_than_its_room(steps):
    kept = Sample(8)
    for k in range(steps):
        kept.offer({"p": torch.tensor([float(k)])}, {"p": torch.zeros(1)})
    chosen = [int(p["p"]) for p, _ in kept.pairs]
    assert len(chosen) <= 8
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert gaps <= {max(1, 2 ** math.ceil(math.log2(steps / 8)))}, chosen
    assert chosen[0] == 0


@pytest.mark.parametrize("room", [0, 1])
def test_a_sample_with_no_room_keeps_one_pair(room):
    """The first, whatever comes after; a room of 0 is one of 1."""
    kept = Sample(room)
    for step in range(9):
        kept.offer({"p": torch.tensor(float(step))}, {"p": torch.tensor(0.0)})
    assert [float(p["p"]) for p, _ in kept.pairs] == [0.0]


# starts ------------------------------------------------------------------------------------------


def past_of(b, count, seed=0):
    generator = stream(seed, "past")
    v = tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), b)
    moves = tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), b)
    return [tree.axpy(0.1 * k + 0.01 * k * k, moves, v) for k in range(count)]


def test_starts_are_their_formulas():
    matvec, _, b = system(log_spectrum(12, 10), 0)
    past = past_of(b, 3)
    v, r = begin("cold", matvec, b, past)
    assert tree.norm(v) == 0
    assert r is None
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

    v, r = begin("galerkin", matvec, b, past)
    assert_close(r, tree.sub(b, matvec(v)), rtol=1e-9)
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
def test_a_galerkin_start_costs_one_product_for_each_adjoint_and_no_other(solver, beyond):
    warm, _ = started_at("warm", solver)
    assert warm.stats.hvps == 3 + beyond
    galerkin, _ = started_at("galerkin", solver)
    assert galerkin.stats.hvps == 3 + beyond - 1 + 3


@pytest.mark.parametrize(
    "solver", [*(s for s, _ in BEYOND), InPlace()], ids=lambda s: type(s).__name__
)
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
    told = known(lambda u: asked.append(u) or matvec(u), v, tree.scale(7.0, b))
    first = told(v)
    assert_close(first, tree.scale(7.0, b), 1e-15)
    tree.scale_(first, 0.0)  # the caller's own
    assert_close(told(v), tree.scale(7.0, b), 1e-15)
    assert not asked
    told(tree.clone(v))
    tree.axpy_(v, 1.0, b)
    assert_close(told(v), matvec(v), 1e-15)
    assert len(asked) == 2


# preconditioners ---------------------------------------------------------------------------------


def seen_by(case, spent=None, damping=0.0):
    losses, at = case.losses(), Point(case.x, case.y)
    A = case.hessian() + damping * torch.eye(tree.size(case.y))
    b = tree.map(torch.ones_like, case.y)
    made = System(lambda v: tree.unflatten(A @ tree.flatten(v), b), b, losses, at, damping, spent)
    return made, A


def matrix_of(inverse, like):
    eye = torch.eye(tree.size(like), dtype=torch.float64)
    return torch.stack([tree.flatten(inverse(tree.unflatten(e, like))) for e in eye], dim=1)


def test_a_known_diagonal_is_that_and_the_damping():
    case = closed_form(PROBLEMS[0], 0)
    made, _ = seen_by(case, damping=0.5)
    given = Diagonal(function=lambda x, y, batch: tree.map(lambda p: p.abs() + 1, y))
    inverse, _ = given.prepare(made, given.init(made.at))
    expected = 1 / (case.y["y"].abs() + 1.5)
    torch.testing.assert_close(inverse(made.b)["y"], expected, rtol=1e-14, atol=0)


def test_the_problem_may_know_its_diagonal():
    problem = Logistic(data="synthetic", num_features=12)
    x, y = problem.init(None)
    y = {"w": y["w"] + 0.3}
    batch = problem.splits["lower"]
    got = problem.lower_diagonal(x, y, batch)["w"]
    losses = Losses(
        Loss(problem.upper_loss, batch, Counts(), "upper"),
        Loss(problem.lower_loss, batch, Counts(), "lower"),
    )
    from bilevel.calculus.products import linearize
    from bilevel.linear.dense import matrix

    H = matrix(linearize(losses.lower, Point(x, y)).hvp_yy, y)
    torch.testing.assert_close(got, H.diagonal(), rtol=1e-12, atol=0)
    made = System(lambda v: v, y, losses, Point(x, y), 0.0, None)
    inverse, _ = Diagonal().prepare(made, {})
    torch.testing.assert_close(inverse(y)["w"], y["w"] / got, rtol=1e-12, atol=0)


def test_a_diagonal_nobody_knows_or_that_is_wrong_is_refused():
    case = closed_form(PROBLEMS[0], 0)
    made, _ = seen_by(case)
    with pytest.raises(ProblemError, match="hutchinson"):
        Diagonal().prepare(made, {})
    with pytest.raises(ProblemError, match="not positive"):
        Diagonal(function=lambda x, y, b: tree.zeros_like(y)).prepare(made, {})
    with pytest.raises(ProblemError, match="shapes"):
        Diagonal(function=lambda x, y, b: {"y": torch.ones(3)}).prepare(made, {})


FRESH = Hutchinson().init(Point({}, {}))


def test_hutchinson_is_unbiased_for_the_diagonal():
    """Within four standard errors over 400 seeds; the variance is the one that is documented."""
    case = closed_form(PROBLEMS[0], 0)
    made, A = seen_by(case, damping=4.0)  # no estimate is negative, so its absolute value is itself
    draws = torch.stack(
        [
            1 / Hutchinson(probes=1, seed=seed).prepare(made, FRESH)[0](made.b)["y"]
            for seed in range(400)
        ]
    )
    off = A - A.diagonal().diag()
    spread = off.square().sum(1).sqrt()
    torch.testing.assert_close(draws.std(0), spread, rtol=0.2, atol=0)
    assert bool(((draws.mean(0) - A.diagonal()).abs() < 4 * spread / 400**0.5).all())
    assert bool(((draws.mean(0) - 1.1 * A.diagonal()).abs() > 4 * spread / 400**0.5).any())


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    d = torch.tensor([3.0, 0.5, 7.0], dtype=torch.float64)
    b = {"y": torch.ones(3, dtype=torch.float64)}
    made = System(lambda v: {"y": d * v["y"]}, b, None, None, 0.0, None)
    inverse, _ = Hutchinson(probes=1).prepare(made, FRESH)
    torch.testing.assert_close(inverse(b)["y"], 1 / d, rtol=1e-14, atol=0)


def test_patience_is_that_of_ski_rental():
    rule = RebuildRule()
    for spent in (9, 4, 6, 5):
        rule = rule.after(spent)
    assert (rule.fewest, rule.excess) == (4, 0 + 0 + 2 + 1)
    assert RebuildRule(0, 0).after(7).excess == 7
    assert rule.after(None) is rule


def test_nystrom_is_built_when_it_would_have_paid_and_is_exact_at_full_rank():
    case = closed_form(PROBLEMS[1], 0)
    made, A = seen_by(case)
    n = tree.size(case.y)
    chosen = Nystrom(rank=n)
    state = chosen.init(made.at)
    inverse, state = chosen.prepare(made, state)
    assert inverse is None, "nothing spent so far"
    inverse, state = chosen.prepare(replace(made, spent=n), state)
    assert inverse is None, "as much as it costs"
    before = dict(state)
    inverse, state = chosen.prepare(replace(made, spent=1), state)
    assert inverse is not None
    assert before["built"] == 0
    M = matrix_of(inverse, made.b)
    values = torch.linalg.eigvalsh((M @ A + (M @ A).T) / 2)
    # rounding of the sketch, relative to ‖A‖, times the condition number
    assert float(values[-1] / values[0]) == pytest.approx(1, abs=1e-3)


def test_nystrom_keeps_to_its_memory_and_leaves_indefinite_matrices_alone():
    case = closed_form(PROBLEMS[1], 0)
    made, _ = seen_by(case, spent=1000)
    few = Nystrom(memory=8.0 * 40 * 5)
    assert few.prepare(made, few.init(made.at))[1]["U"].shape == (40, 5)
    upside = replace(made, matvec=lambda v: tree.scale(-1.0, made.matvec(v)))
    chosen = Nystrom(rank=10)
    inverse, state = chosen.prepare(upside, chosen.init(made.at))
    assert inverse is None
    assert state["refused"] == 1


def pairs_of(A, b, solver):
    kept = Sample(1000)
    run_cg(solver, lambda v: tree.unflatten(A @ tree.flatten(v), b), b, keep=kept)
    return kept.pairs


def test_recycled_pairs_are_mapped_back_and_leave_little_to_do():
    matvec, A, b = system(log_spectrum(30, 1e4), 0)
    pairs = pairs_of(A, b, CG(iterations=8, tolerance=0.0))
    state = Recycled().learn({}, pairs)
    made = System(matvec, b, None, None, 0.0, 8)
    inverse, same = Recycled().prepare(made, state)
    assert same is state
    for p, Ap in pairs:
        assert relative(inverse(Ap), p) < 1e-6
    M = matrix_of(inverse, b)
    assert float((M - M.T).norm() / M.norm()) < 1e-10
    assert float(torch.linalg.eigvalsh((M + M.T) / 2)[0]) > 0
    for other in pairs_of(A, tree.map(torch.ones_like, b), CG(iterations=1, tolerance=0.0)):
        assert relative(inverse(other[1]), other[0]) > 1e-3, "not what was never seen"


def test_recycled_pairs_age_out_at_the_room_there_is():
    _, A, b = system(log_spectrum(30, 10), 0)
    chosen = Recycled(pairs=10)
    state = chosen.learn({}, pairs_of(A, b, CG(iterations=7, tolerance=0.0)))
    oldest = state["S"][:, :4].clone()
    kept = {name: part.clone() for name, part in state.items()}
    more = chosen.learn(
        state, pairs_of(A, tree.map(torch.ones_like, b), CG(iterations=7, tolerance=0))
    )
    assert more["S"].shape == (30, 10)
    torch.testing.assert_close(more["S"][:, :3], state["S"][:, 4:], rtol=0, atol=0)
    torch.testing.assert_close(more["M"], more["S"].T @ more["C"], rtol=1e-9, atol=1e-12)
    assert all(torch.equal(kept[name], state[name]) for name in kept), "the state was written into"
    assert oldest.shape == (30, 4)
    assert chosen.learn(state, []) is state
    assert Recycled(memory=2 * 8.0 * 30 * 6).room(b) == 6


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_recycled_directions_without_curvature_are_left_out(factor):
    b = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    first = {"y": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    second = {"y": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    state = Recycled().learn({}, [(second, tree.scale(factor, second)), (first, first)])
    inverse, _ = Recycled().prepare(System(lambda v: v, b, None, None, 0.0, None), state)
    M = matrix_of(inverse, b)
    assert bool(torch.isfinite(M).all())
    assert float(torch.linalg.eigvalsh((M + M.T) / 2)[0]) > 0


PRECONDITIONERS = [Nothing(), Hutchinson(), Nystrom(rank=20), Recycled()]


@pytest.mark.parametrize("chosen", PRECONDITIONERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "make", PROBLEMS, ids=["q", "ill", "1 lower", "1 upper", "ridge", "scaled"]
)
def test_each_leads_to_the_closed_form_along_a_run(chosen, make):
    case = closed_form(make, 0)
    values = torch.linalg.eigvalsh(case.hessian())
    condition = float(values[-1] / values[0])
    estimator = Implicit(solver=CG(iterations=3000, tolerance=1e-11), preconditioner=chosen)
    state = None
    for _ in range(5):
        got = case.estimate(estimator, state=state)
        state = got.state
        assert_close(got.hypergradient, case.truth, rtol=max(1e-9, condition * 1e-10))


@pytest.mark.parametrize("chosen", PRECONDITIONERS, ids=lambda p: type(p).__name__)
def test_a_zero_right_hand_side_has_adjoint_zero(chosen):
    case = closed_form(PROBLEMS[0], 0)

    def flat(x, y, batch):
        return (x["x"] ** 2).sum() + 0 * y["y"].sum()

    for error in (None, 1e-3):
        estimator, state = Implicit(preconditioner=chosen, error=error), None
        for _ in range(3):
            got = hypergradient(
                flat,
                case.problem.lower_loss,
                case.x,
                case.y,
                estimator=estimator,
                lower_batch=case.lower_batch,
                state=state,
            )
            state = got.state
            torch.testing.assert_close(got.hypergradient["x"], 2 * case.x["x"], rtol=1e-14, atol=0)
            assert got.stats.converged


# the asked error ---------------------------------------------------------------------------------


def worst(make, estimator, seeds=range(4)):
    return max(error for seed in seeds for error, _ in walk(make(seed), estimator, 6, 0.2, seed))


CHANGING = {
    "cond 10": lambda seed: Quadratic(num_upper=8, num_lower=60, condition=10, data_seed=seed),
    "cond 1e3": lambda seed: Quadratic(num_upper=8, num_lower=60, condition=1e3, data_seed=seed),
    "cond 1e5": lambda seed: Quadratic(num_upper=8, num_lower=60, condition=1e5, data_seed=seed),
    "diabetes": lambda seed: Ridge(data_seed=seed),
    "badly scaled": lambda seed: Ridge(data="synthetic", data_seed=seed),
}


@pytest.mark.parametrize("make", CHANGING.values(), ids=CHANGING)
@pytest.mark.parametrize("start", ["cold", "warm", "linear", "galerkin"])
def test_the_asked_error_is_held(make, start):
    assert worst(make, Implicit(error=1e-3, start=start)) <= 1e-3


def along(upper, lower, truth, solution, estimator, x, steps, lr):
    """(relative error, stats) of every call of a run that follows the truth."""
    state, found = None, []
    for _ in range(steps):
        got = hypergradient(upper, lower, x, solution(x), estimator=estimator, state=state)
        h, state = truth(x), got.state
        error = tree.norm(tree.sub(got.hypergradient, h)) / tree.norm(h)
        found.append((error, got.stats))
        x = tree.axpy(-lr, h, x)
    return found


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_the_asked_error_is_held_over_many_calls_that_need_no_step(lr):
    """Long runs of calls that the start alone satisfies: nothing new is seen, A and b drift."""
    generator, dim = torch.Generator().manual_seed(0), 60
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    c = torch.randn(dim, generator=generator, dtype=torch.float64)
    K = Q @ torch.diag(torch.logspace(0, 4, dim, dtype=torch.float64)) @ Q.T

    def lower(x, y, batch):
        bent = y["y"] @ (K @ y["y"]) + (x["x"].exp() * y["y"].square()).sum()
        return bent / 2 - (K @ c) @ y["y"]

    def upper(x, y, batch):
        return (y["y"] - 1).square().sum() / 2

    def solution(x):
        return {"y": torch.linalg.solve(K + torch.diag(x["x"].exp()), K @ c)}

    def truth(x):
        y = solution(x)["y"]
        v = torch.linalg.solve(K + torch.diag(x["x"].exp()), y - 1)
        return {"x": -x["x"].exp() * y * v}

    start = {"x": torch.zeros(dim, dtype=torch.float64)}
    found = along(upper, lower, truth, solution, Implicit(error=1e-2), start, 120, lr)
    assert all(stats.converged for _, stats in found)
    assert sum(stats.iterations == 0 for _, stats in found) >= 5
    assert max(error for error, _ in found) <= 1e-2


def test_a_coupling_that_was_zero_is_not_taken_for_zero_ever_after():
    c = torch.linspace(-3.0, 2.0, 30, dtype=torch.float64)
    A = torch.diag(torch.logspace(0, 3, 30, dtype=torch.float64)) + 0.1 * torch.outer(c, c)

    def lower(x, y, batch):
        return y["y"] @ (A @ y["y"]) / 2 - 10 * (x["x"].square() * c) @ y["y"]

    def upper(x, y, batch):
        return (y["y"] - c).square().sum() / 2 + 0.1 * (x["x"] - 1).square().sum()

    def solution(x):
        return {"y": torch.linalg.solve(A, 10 * x["x"].square() * c)}

    def truth(x):
        v = torch.linalg.solve(A, solution(x)["y"] - c)
        return {"x": 0.2 * (x["x"] - 1) + 20 * x["x"] * c * v}

    start = {"x": torch.zeros(30, dtype=torch.float64)}
    found = along(upper, lower, truth, solution, Implicit(error=1e-2), start, 6, 0.05)
    assert max(error for error, _ in found) <= 1e-2
    assert found[0][1].error_bound is None  # nothing was seen that could say


def test_a_relative_residual_of_that_size_does_not_hold_it():
    """Negative control: on one of the problems above it is five times too large."""
    plain = Implicit(solver=CG(iterations=5000, tolerance=1e-3), start="cold")
    assert max(worst(make, plain) for make in CHANGING.values()) > 5e-3


def test_a_smaller_error_takes_more_products_and_a_larger_one_fewer():
    spent = [
        sum(hvps for _, hvps in walk(CHANGING["cond 1e3"](0), Implicit(error=e), 6, 0.2, 0))
        for e in (1e-1, 1e-3, 1e-6)
    ]
    assert spent[0] < spent[1] < spent[2]


def test_an_error_that_is_not_reached_is_said():
    case = closed_form(PROBLEMS[1], 0)
    short = Implicit(error=1e-3, solver=CG(iterations=6))
    got = case.estimate(short)
    assert relative(got.hypergradient, case.truth) > 1e-3
    assert got.stats.converged is False


def test_only_cg_takes_them():
    for options in ({"error": 1e-3}, {"preconditioner": Recycled()}):
        with pytest.raises(pydantic.ValidationError, match="solver: cg"):
            Implicit(solver=Dense(), **options)
    with pytest.raises(pydantic.ValidationError, match="together"):
        Implicit(strong_convexity=1.0)


# the bound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_with_known_constants_the_bound_is_one(seed):
    case = closed_form(PROBLEMS[1], seed)
    k = case.problem.constants
    mu, cross = float(torch.linalg.eigvalsh(k["A"])[0]), float(torch.linalg.matrix_norm(k["B"], 2))
    # h(y) − h(y*) = (Dᵀ + Bᵀ A⁻¹)(y − y*), typed out
    lipschitz = float(torch.linalg.matrix_norm(k["D"].T + k["B"].T @ torch.linalg.inv(k["A"]), 2))
    known = Implicit(strong_convexity=mu, cross_norm=cross, sensitivity=lipschitz)
    for steps in (1, 5, 20, 80):
        for off in (0.0, 1e-3, 1.0):
            y = {"y": case.y["y"] + off * torch.linspace(-1, 1, 40)}
            got = case.estimate(replace(known, solver=CG(iterations=steps, tolerance=1e-13)), y)
            true = tree.norm(tree.sub(got.hypergradient, case.truth))
            assert true <= got.stats.error_bound * (1 + 1e-6)
            assert got.stats.error_bound_from == "known constants"
    wrong = replace(known, strong_convexity=1e4 * mu, solver=CG(iterations=5))
    got = case.estimate(wrong)
    assert tree.norm(tree.sub(got.hypergradient, case.truth)) > got.stats.error_bound


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
def test_with_known_constants_the_bound_counts_the_damping(damping):
    case = closed_form(PROBLEMS[1], 0)
    k = case.problem.constants
    mu, cross = float(torch.linalg.eigvalsh(k["A"])[0]), float(torch.linalg.matrix_norm(k["B"], 2))
    known = Implicit(damping=damping, strong_convexity=mu, cross_norm=cross)
    for steps in (5, 500):
        got = case.estimate(replace(known, solver=CG(iterations=steps, tolerance=1e-12)))
        true = tree.norm(tree.sub(got.hypergradient, case.truth))
        assert 0 < true <= got.stats.error_bound
        # the constant that says how far an unsolved y leads off was not given
        assert got.stats.error_bound_from == "known constants, y taken as solved"


def test_known_constants_say_nothing_of_gauss_newton():
    with pytest.raises(ValueError, match="bounds nothing with curvature: gauss_newton"):
        Implicit(curvature="gauss_newton", strong_convexity=1.0, cross_norm=1.0)


def test_the_estimated_bound_says_where_it_comes_from():
    case = closed_form(PROBLEMS[1], 0)
    got = case.estimate(Implicit(error=1e-3))
    assert got.stats.error_bound_from == "Ritz values, y taken as solved"
    assert tree.norm(tree.sub(got.hypergradient, case.truth)) <= got.stats.error_bound
    assert case.estimate(Implicit()).stats.error_bound is None


# products ----------------------------------------------------------------------------------------


def test_an_eighth_of_the_products_of_cold_conjugate_gradient():
    """Cold CG stopped by the truth itself; ours by what it can know, all it spends counted."""
    problem = Logistic(data="synthetic", num_features=60, spread=300.0, initial_log_penalty=-12.0)
    points = run_of(problem, 25)
    conditions = [point.condition for point in points]
    assert min(conditions) > 1e4
    errors, spent = run_with(points, Implicit(error=1e-3))
    assert max(errors) <= 1e-3
    assert 8 * spent <= cold_products(points, 1e-3)
    errors, warm = run_with(points, Implicit(error=1e-3, start="cold", preconditioner=Nothing()))
    assert 8 * warm > cold_products(points, 1e-3), "negative control: without them it is not"


def run_with(points, estimator):
    from tests.benchmarks.products import along

    found = along(points, estimator)
    return [error for error, _ in found], sum(spent for _, spent in found)


# memory ------------------------------------------------------------------------------------------


class Counted:
    """How many vectors of the size of y are alive in Python at each product."""

    SIZE = 1009

    def __init__(self, product):
        self.product, self.alive = product, []

    def __call__(self, linearization, vector):
        gc.collect()
        storages = {
            found.untyped_storage().data_ptr()
            for found in gc.get_objects()
            if type(found) is torch.Tensor and found.numel() == self.SIZE
        }
        self.alive.append(len(storages))
        return self.product(linearization, vector)


def kept_by(solver, monkeypatch):
    """Vectors alive at the product where there are most, with those of the problem left out."""
    counted = Counted(calculus.Linearization.hvp_yy)
    monkeypatch.setattr(calculus.Linearization, "hvp_yy", lambda self, v: counted(self, v))
    d = torch.linspace(1, 50, Counted.SIZE, dtype=torch.float64)

    def upper_loss(x, y, batch):
        return y["y"].square().sum()

    def lower_loss(x, y, batch):
        return 0.5 * (d * y["y"].square()).sum() - x["x"] * y["y"].sum()

    gc.collect()
    gc.freeze()  # so that looking at what is new takes no time; d among what is not looked at
    try:
        x, y = {"x": torch.tensor(2.0, dtype=torch.float64)}, {"y": 1 / d}
        hypergradient(upper_loss, lower_loss, x, y, estimator=Implicit(solver=solver))
    finally:
        gc.unfreeze()
    assert len(counted.alive) == 6
    return max(counted.alive) - 1  # y


def test_conjugate_gradient_keeps_three_vectors_and_the_gradient(monkeypatch):
    """v, r and p; neither the right-hand side nor the start, nor the last product."""
    assert kept_by(CG(iterations=6, tolerance=0.0), monkeypatch) == 3 + 1


def test_gmres_keeps_its_basis(monkeypatch):
    assert kept_by(GMRES(iterations=6), monkeypatch) > 6


# scales and floors -------------------------------------------------------------------------------


def diagonal_system(*entries):
    """(system, b) of a diagonal A, of which random signs find the diagonal exactly."""
    d = torch.tensor(entries, dtype=torch.float64)
    b = {"y": torch.ones(len(d), dtype=torch.float64)}
    return System(lambda v: {"y": d * v["y"]}, b, None, None, 0.0, None), b


def test_hutchinson_leaves_no_entry_below_its_floor():
    """The largest here is 0.5, so that a floor of 1e-3 of it is not 1e-3."""
    made, b = diagonal_system(0.5, -0.25, 1e-9, 0.0)
    inverse, _ = Hutchinson(probes=3, floor=1e-3).prepare(made, FRESH)
    expected = torch.tensor([2.0, 4.0, 2e3, 2e3], dtype=torch.float64)
    torch.testing.assert_close(inverse(b)["y"], expected, rtol=1e-12, atol=0)


def test_hutchinson_that_sees_no_curvature_is_the_identity():
    made, b = diagonal_system(0.0, 0.0)
    inverse, _ = Hutchinson().prepare(made, FRESH)
    assert torch.equal(inverse(b)["y"], b["y"])


@pytest.mark.parametrize("seed", range(5))
def test_nystrom_is_built_where_A_has_less_rank_than_asked_for(seed):
    """The core matrix is then singular, and has a factor only for the shift by rounding."""
    spectrum = [0.0] * 35 + [1.0, 2.0, 3.0, 4.0, 5.0]
    matvec, A, b = system(spectrum, seed)
    chosen = Nystrom(rank=20, seed=seed)
    made = System(matvec, b, None, None, 0.0, 1000)
    inverse, state = chosen.prepare(made, chosen.init(Point({}, b)))
    assert (state["built"], state["refused"]) == (1, 0)
    assert inverse is not None
    found = state["U"] @ state["values"].diag() @ state["U"].T
    # what is dropped of A is of the size of the shift, eps times the norm of the sketch
    torch.testing.assert_close(found, A, rtol=0, atol=1e-12)


# what is not held is not said to be ---------------------------------------------------------------


def quadratic_of(eigenvalues, seed, dtype):
    """(F, G, x, y, dΦ/dx) of a random quadratic with these eigenvalues, y solved in float64."""
    draw, n = stream(seed, "rotated"), len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    B = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    x, t = (torch.randn(k, generator=draw, dtype=torch.float64) for k in (3, n))
    y = torch.linalg.solve(A, B @ x)
    truth = {"x": B.T @ torch.linalg.solve(A, y - t)}
    A_, B_, t_ = A.to(dtype), B.to(dtype), t.to(dtype)

    def F(x, y, batch):
        return 0.5 * (y["y"] - t_).square().sum()

    def G(x, y, batch):
        return 0.5 * y["y"] @ (A_ @ y["y"]) - y["y"] @ (B_ @ x["x"])

    return F, G, {"x": x.to(dtype)}, {"y": y.to(dtype)}, truth


def asked_of(problem, estimator):
    """(relative error, stats)."""
    F, G, x, y, truth = problem
    got = hypergradient(F, G, x, y, estimator=estimator)
    return relative(tree.map(torch.Tensor.double, got.hypergradient), truth), got.stats


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.bfloat16, 10.0), (torch.bfloat16, 300.0), (torch.float32, 3e5), (torch.float32, 1e6)],
)
def test_what_rounding_leaves_is_not_said_to_be_held(dtype, condition, seed):
    problem = quadratic_of(log_spectrum(30, condition), seed, dtype)
    error, stats = asked_of(problem, Implicit(error=1e-3))
    assert error <= 1e-3 or not stats.converged


@pytest.mark.parametrize("seed", range(5))
def test_what_float32_can_hold_is_said_to_be_held(seed):
    """The other side of it: a flag that is always down says nothing."""
    problem = quadratic_of(log_spectrum(30, 1e3), seed, torch.float32)
    error, stats = asked_of(problem, Implicit(error=1e-2))
    assert error <= 1e-2
    assert stats.converged


class Upside:
    """No preconditioner: −I is not positive definite."""

    def init(self, at):
        return {}

    def prepare(self, system, state):
        return lambda r: tree.scale(-1.0, r), state


def test_a_preconditioner_that_is_none_is_not_said_to_have_held():
    problem = quadratic_of(log_spectrum(30, 10.0), 0, torch.float64)
    error, stats = asked_of(problem, Implicit(error=1e-3, preconditioner=Upside()))
    assert error > 0.1
    assert stats.converged is False


@pytest.mark.parametrize("scale", [1e-24, 1e-18, 1e17, 1e18])
@pytest.mark.parametrize("error", [None, 1e-3])
def test_the_size_of_the_loss_is_no_matter_in_float32(scale, error):
    """Squares of 1e-24 are zeros in float32, and those of 1e18 sum to infinity."""
    F, G, x, y, truth = quadratic_of(log_spectrum(30, 10.0), 0, torch.float32)
    scaled = (lambda x, y, b: scale * F(x, y, b)), G, x, y, tree.scale(scale, truth)
    found, stats = asked_of(scaled, Implicit(error=error))
    assert found <= 1e-3
    assert stats.converged
    assert math.isfinite(stats.residual)


@pytest.mark.parametrize("part", [1e-2, 1e-4])
def test_a_flat_direction_with_little_of_b_in_it_is_met(part):
    """b has `part` of itself along an eigenvector of 1e-4, and h nearly all that comes of it."""
    d = torch.linspace(0.5, 1, 31, dtype=torch.float64)
    d[0] = 1e-4
    draw = stream(2, "flat")
    B = torch.randn(31, 3, generator=draw, dtype=torch.float64)
    b = torch.randn(31, generator=draw, dtype=torch.float64)
    b[0] = part

    def G(x, y, batch):
        return 0.5 * (d * y["y"].square()).sum() - y["y"] @ (B @ x["x"])

    def F(x, y, batch):
        return y["y"] @ b

    x = {"x": torch.ones(3, dtype=torch.float64)}
    problem = F, G, x, {"y": B @ x["x"] / d}, {"x": B.T @ (b / d)}
    for asked in (1e-1, 1e-2, 1e-3):
        error, stats = asked_of(problem, Implicit(error=asked))
        assert error <= asked
        assert stats.converged
    error, _ = asked_of(problem, Implicit(solver=CG(iterations=6)))
    assert error > 0.1, "where the rule would have stopped without"
