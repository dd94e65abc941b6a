"""Fixed points and proximal maps below, against closed forms."""

import math

import pytest
import torch

from bilevel import hypergradient, testing, tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.lower.iterate import Iterate
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.levels import structure_of
from bilevel.rng import stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Solve, Stats, Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close, closed_form, relative
from tests.estimators.maps import EXACT, SEEDS, Recurrent, ask, at_random


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solver", [EXACT, Dense(), Neumann(scale=1.0).tight(6)], ids=repr)
def test_a_map_of_no_symmetry(solver, seed):
    p = Recurrent(seed)
    got = ask(p, p.x, p.solved(), FixedPoint(solver=solver))
    assert_close(got.hypergradient, p.truth(), rtol=1e-9)
    assert got.stats.converged
    assert got.stats.degenerate == 0
    assert got.stats.curvature is None, "a map has none"


def test_the_transpose_is_not_the_matrix():
    """Negative control: the closed form with (I − DW)⁻ᵀ in the place of the inverse is far away."""
    p = Recurrent(0)
    y = p.solved()["y"]
    D = (1 - y**2).diag()
    wrong = torch.linalg.solve((torch.eye(6, dtype=y.dtype) - D @ p.W).T, D).T @ (y - p.t)
    assert relative({"x": 0.4 * p.x["x"] ** 3 + wrong}, p.truth()) > 0.05


def test_the_oracle_counts_of_a_map():
    p = Recurrent(0)
    got = ask(p, p.x, p.solved(), FixedPoint(solver=Neumann(scale=1.0, iterations=7)))
    assert got.stats.gradients == 2, "F and T once each"
    assert got.stats.hvps == 8, "7 terms and the true residual"
    assert got.stats.cross_products == 1


def test_the_fixed_point_iteration_converges_at_the_spectral_radius():
    """y = W y + x with W = P diag(0.9, 0.5, −0.4, …) P⁻¹: not the norm of W but its radius decides."""
    p, s = Recurrent(0), stream(0, "radius")
    P = torch.randn(6, 6, generator=s, dtype=torch.float64)
    values = torch.tensor([0.9, 0.5, -0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    W = P @ values.diag() @ torch.linalg.inv(P)
    assert float(torch.linalg.matrix_norm(W, 2)) > 1
    p.lower_map = lambda x, y, b: {"y": W @ y["y"] + x["x"]}  # pyright: ignore
    inverse = torch.linalg.inv(torch.eye(6, dtype=W.dtype) - W)
    x = p.x["x"]
    y = inverse @ x
    truth = {"x": 0.4 * x**3 + inverse.T @ (y - p.t)}
    errors = []
    for K in (40, 80):
        solver = Neumann(scale=1.0, iterations=K)
        got = ask(p, p.x, {"y": y}, FixedPoint(solver=solver))
        errors.append(relative(got.hypergradient, truth))
    # the next eigenvalue has decayed to (0.5 / 0.9)^40 < 1e-10 of the first
    assert (errors[1] / errors[0]) ** (1 / 40) == pytest.approx(0.9, rel=1e-6)
    assert_close(ask(p, p.x, {"y": y}, FixedPoint(solver=EXACT)).hypergradient, truth, rtol=1e-10)


def test_what_is_no_contraction_is_refused_within_four_terms_with_the_remedy():
    case = closed_form(lambda seed: Quadratic(data_seed=seed), 0)
    ends = []
    for lr in (1.9, 2.3):  # the largest eigenvalue is 1: |1 − lr| is 0.9 and 1.3
        solver = Neumann(scale=1.0, iterations=50)
        try:
            ends.append(case.estimate(FixedPoint(lr=lr, solver=solver)).stats.residual)
        except ConvergenceError as error:
            ends.append(str(error))
    assert ends[0] < 1
    assert "not a contraction" in ends[1]
    assert "lower `lr` = 2.3" in ends[1]
    assert "gmres" in ends[1]
    case.estimate(FixedPoint(lr=2.3, solver=EXACT))


def test_divergence_is_recognised_in_three_terms():
    p = Recurrent(0)
    p.W = 2 * torch.eye(6, dtype=torch.float64)
    p.lower_map = lambda x, y, b: {"y": p.W @ y["y"] + x["x"]}  # pyright: ignore
    calls = []
    linear = p.lower_map
    p.lower_map = lambda x, y, b: calls.append(1) or linear(x, y, b)  # pyright: ignore
    with pytest.raises(ConvergenceError, match="term 3 is 2 times the one before"):
        ask(p, p.x, {"y": -p.x["x"]}, FixedPoint(solver=Neumann(scale=1.0, iterations=50)))


def test_the_merit_function_has_the_same_hypergradient_at_a_squared_condition():
    p = Recurrent(2)
    y = p.solved()
    merit = ask(p, p.x, y, Implicit(solver=Dense()))
    own = ask(p, p.x, y, FixedPoint(solver=Dense()))
    assert_close(merit.hypergradient, p.truth(), rtol=1e-9)
    assert merit.stats.condition == pytest.approx(own.stats.condition**2, rel=1e-6)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x, y, b: {"y": y["y"][:2]}, r"lower_map must return y .*; got \{'y': \(2,\)"),
        (lambda x, y, b: {"z": y["y"]}, r"lower_map must return y .*; got \{'z'"),
        (lambda x, y, b: {"y": y["y"].detach()}, "depends on neither x nor y"),
    ],
)
def test_a_map_that_is_none_is_refused(broken, message):
    p = Recurrent(0)
    p.lower_map = broken  # pyright: ignore
    p.lower_loss = lambda x, y, b: sum((part**2).sum() for part in y.values())  # pyright: ignore
    with pytest.raises(ProblemError, match=message):
        ask(p, p.x, {"y": p.t}, FixedPoint())


def test_a_run_of_a_map_problem_and_its_check():
    p = Recurrent(0)
    made = Setup(
        p, Iterate(), Upper(steps=60, optimizer=SGD(lr=0.05)), FixedPoint(), dtype=torch.float64
    )
    rows = {
        r.name: r
        for r in testing.check(made, {"own": FixedPoint(), "merit": Implicit()})
        if hasattr(r, "name")
    }
    assert rows["own"].reference == "central differences"
    assert (rows["own"].verdict, rows["merit"].verdict) == ("exact", "exact")
    state = engine.start(made)
    list(engine.run(made, state))
    p.x = state.x
    assert tree.norm(p.truth()) < 0.1 * tree.norm(Recurrent(0).truth())


@pytest.mark.parametrize("lr", [0.1, 1.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_gradient_step_is_implicit_differentiation_whatever_its_length(lr, seed):
    case = closed_form(lambda s: Quadratic(data_seed=s), seed)
    got = case.estimate(FixedPoint(lr=lr, solver=EXACT))
    assert_close(got.hypergradient, case.truth, rtol=1e-10)
    smallest = float(torch.linalg.eigvalsh(case.hessian())[0])
    assert got.stats.curvature >= smallest - 1e-12


HELD = {
    "box": (lambda seed: BoxQP(data_seed=seed), 1e-9),
    "lasso": (lambda seed: Lasso(data_seed=seed), 1e-9),
    "one penalty": (lambda seed: Lasso(data_seed=seed, per_feature=False), 1e-9),
    "more features than samples": (
        lambda seed: Lasso(
            data_seed=seed, num_features=40, num_samples=30, initial_log_penalty=-1.0
        ),
        1e-8,
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("make", "rtol"), HELD.values(), ids=HELD)
@pytest.mark.parametrize("lr", [0.1, 0.7])
def test_active_sets_agree_with_the_closed_form(make, rtol, seed, lr):
    p = make(seed)
    x = at_random(p, seed)
    y = p.lower_solution(x)
    got = ask(p, x, y, FixedPoint(lr=lr, solver=EXACT))
    assert_close(got.hypergradient, p.hypergradient(x), rtol=rtol)
    assert got.stats.degenerate == 0


def test_the_problems_are_not_trivial():
    """Negative control: some constraints are active, some not, and ignoring them is far off."""
    for make, _ in HELD.values():
        p = make(0)
        x = at_random(p, 0)
        y = next(iter(p.lower_solution(x).values()))
        active = (y.abs() >= p.bound) if isinstance(p, BoxQP) else y == 0
        assert 0 < int(active.sum()) < len(y)
    p = BoxQP()
    x = at_random(p, 0)
    blind = ask(p, x, p.lower_solution(x), Implicit(solver=Dense()))
    assert relative(blind.hypergradient, p.hypergradient(x)) > 0.5


@pytest.mark.parametrize("make", [BoxQP, Lasso])
def test_the_closed_forms_are_derivatives(make):
    p = make()
    x = at_random(p, 1)
    (name, at), h = next(iter(x.items())), 1e-5
    truth = p.hypergradient(x)[name]
    batch = next(p.upper_batches(None))
    for i in range(3):
        e = torch.zeros_like(at)
        e[i] = h
        ends = [{name: at + s * e} for s in (1, -1)]
        up, down = (float(p.upper_loss(z, p.lower_solution(z), batch)) for z in ends)
        assert (up - down) / (2 * h) == pytest.approx(float(truth[i]), abs=1e-7)


def test_a_y_that_is_not_solved_is_flagged_where_the_active_set_is_in_doubt():
    p = BoxQP()
    x = at_random(p, 0)
    y = p.project_lower(
        tree.axpy(0.3, tree.map(torch.ones_like, p.lower_solution(x)), p.lower_solution(x))
    )
    stats = ask(p, x, y, FixedPoint(solver=EXACT)).stats
    assert (stats.converged, stats.stopped) == (False, "degenerate")


def test_a_singular_lower_hessian_is_flagged():
    p = BoxQP()
    x = at_random(p, 0)
    k = p.constants
    y = p.lower_solution(x)
    e = torch.linalg.eigh(k["A"])
    k["A"].copy_(e.eigenvectors[:, 1:] @ e.eigenvalues[1:].diag() @ e.eigenvectors[:, 1:].T)
    free = Quadratic()
    free.constants["A"].copy_(k["A"])
    x = at_random(free, 0)
    y = {"y": torch.zeros(10, dtype=torch.float64)}
    for solver in (EXACT, Dense(), CG(iterations=100)):
        got = ask(free, x, y, FixedPoint(solver=solver))
        assert got.stats.converged is False


def test_an_indefinite_lower_hessian_shows_in_the_curvature():
    free = Quadratic()
    free.constants["A"].sub_(0.5 * torch.eye(10, dtype=torch.float64))
    x = at_random(free, 0)
    got = ask(free, x, free.lower_solution(x), FixedPoint(solver=EXACT))
    assert got.stats.curvature < 0
    with pytest.raises(ConvergenceError, match="not a contraction"):
        ask(
            free,
            x,
            free.lower_solution(x),
            FixedPoint(lr=1.0, solver=Neumann(scale=1.0, iterations=500)),
        )


def test_a_symmetric_solver_on_a_map_of_no_symmetry_does_not_pass_for_converged():
    p = Recurrent(1, radius=0.9)
    got = ask(p, p.x, p.solved(), FixedPoint(solver=MINRES(iterations=6, tolerance=1e-6)))
    assert got.stats.converged is False
    assert got.stats.stopped in ("iterations", "unverified")
    assert got.stats.residual > 1e-3


def test_no_active_constraint_is_plain_implicit_differentiation():
    p = BoxQP(bound=50.0)
    x = at_random(p, 0)
    y = p.lower_solution(x)
    plain = ask(p, x, y, Implicit(solver=Dense()))
    for estimator in (KKT(solver=Dense()), FixedPoint(solver=EXACT)):
        assert_close(ask(p, x, y, estimator).hypergradient, plain.hypergradient, rtol=1e-10)


def test_tied_names_below_a_map():
    p = Recurrent(0)
    one = p.solved()["y"]

    def both(x, y, batch):
        after = p.lower_map(x, {"y": (y["a"] + y["b"]) / 2}, batch)["y"]
        return {"a": after, "b": after}

    got = hypergradient(
        lambda x, y, b: p.upper_loss(x, {"y": y["b"]}, b),
        lambda x, y, b: p.lower_loss(x, {"y": y["a"]}, b),
        p.x,
        {"a": one, "b": one},
        estimator=FixedPoint(solver=EXACT),
        structure=Structure(map=both),
    )
    assert_close(got.hypergradient, p.truth(), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32(dtype):
    p = Lasso()
    x = tree.to(at_random(p, 0), "cpu", dtype)
    y = p.lower_solution(x)
    got = hypergradient(
        p.upper_loss,
        p.lower_loss,
        x,
        y,
        estimator=FixedPoint(lr=0.5, solver=GMRES(iterations=60, restart=60)),
        upper_batch=tree.to(p.splits["upper"], "cpu", dtype),
        lower_batch=tree.to(p.splits["lower"], "cpu", dtype),
        structure=structure_of(p),
    )
    assert got.hypergradient["log_penalty"].dtype == dtype
    truth = tree.to(p.hypergradient(x), "cpu", dtype)
    assert_close(got.hypergradient, truth, rtol=1e-4)
    assert math.isfinite(got.stats.residual)


class Boasts:
    """Returns b and says that it has solved."""

    tolerance = 1e-6

    def solve(self, matvec, b, start):
        return Solve(b, Stats(residual=0.0, converged=True))


def test_a_solver_that_only_says_it_has_converged_is_found_out():
    p = Recurrent(0)
    got = ask(p, p.x, p.solved(), FixedPoint(solver=Boasts()))
    assert (got.stats.converged, got.stats.stopped) == (False, "unverified")
    assert got.stats.residual > 0.1


class Claims:
    """A third of the solution, with a residual of its own saying."""

    tolerance = 1e-6

    def __init__(self, residual):
        self.residual = residual

    def solve(self, matvec, b, start):
        v = Dense().solve(matvec, b, start).solution
        return Solve(tree.scale(1 / 3, v), Stats(residual=self.residual, converged=True))


@pytest.mark.parametrize(("claimed", "believed"), [(2 / 3 / 9.9, True), (2 / 3 / 10.1, False)])
def test_a_residual_is_believed_to_a_factor_of_ten(claimed, believed):
    """‖b − A v‖ / ‖b‖ = 2/3 at v = A⁻¹b / 3, whatever the size of b."""
    p = Recurrent(0)
    for size in (1.0, 1e3):
        large = Recurrent(0)
        large.upper_loss = lambda *at, size=size: size * p.upper_loss(*at)  # pyright: ignore
        got = ask(large, p.x, p.solved(), FixedPoint(solver=Claims(claimed)))
        assert got.stats.residual == pytest.approx(2 / 3, rel=1e-12)
        assert got.stats.converged is believed


def test_an_approximate_solve_claims_nothing():
    for make in (FixedPoint, KKT):
        assert make().claim == "solution"
        assert make(solver=Identity()).claim is None
