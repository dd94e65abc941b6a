"""Fixed points, proximal maps and constraints below, against closed forms typed out here."""

import itertools
import math

import pytest
import torch

from bilevel import hypergradient, solve_lower, testing, tree
from bilevel.calculus.fixed_point_maps import linearize_map
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.lancbio import LancBiO
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.events import Warned
from bilevel.functional import estimate_at
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.lower.iterate import Iterate
from bilevel.lower.proximal import Proximal
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.protocol import structure_of
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Counts, Loss, Point, Solve, Stats, Structure
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close, closed_form, relative

SEEDS = range(3)
EXACT = GMRES(iterations=200, restart=60, tolerance=1e-13)


class Recurrent:
    """y = tanh(W y + x) with a W of no symmetry; h = (F_y)ᵀ (I − D W)⁻¹ D, D = diag(1 − y²)."""

    def __init__(self, seed=0, radius=0.6, dim=6):
        s = stream(seed, "recurrent")
        W = torch.randn(dim, dim, generator=s, dtype=torch.float64)
        self.W = W * radius / float(torch.linalg.eigvals(W).abs().max())
        self.t = torch.randn(dim, generator=s, dtype=torch.float64) + 1
        self.x = {"x": torch.randn(dim, generator=s, dtype=torch.float64)}

    def init(self, streams):
        return self.x, {"y": torch.zeros_like(self.t)}

    def lower_map(self, x, y, batch):
        return {"y": torch.tanh(self.W @ y["y"] + x["x"])}

    def upper_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.t) ** 2).sum() + 0.1 * (x["x"] ** 4).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.lower_map(x, y, batch)["y"]) ** 2).sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def solved(self):
        y = {"y": torch.zeros_like(self.t)}
        for _ in range(2000):
            y = self.lower_map(self.x, y, None)
        return y

    def truth(self):
        y, x = self.solved()["y"], self.x["x"]
        D = (1 - y**2).diag()
        response = torch.linalg.solve(torch.eye(len(y), dtype=y.dtype) - D @ self.W, D)
        return {"x": 0.4 * x**3 + response.T @ (y - self.t)}


def ask(problem, x, y, estimator, **options):
    """The hypergradient of a problem object at (x, y), by an estimator that may not know its set."""
    return estimate_at(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=next(problem.upper_batches(None)),
        lower_batch=next(problem.lower_batches(None)),
        project=getattr(problem, "project_lower", None),
        structure=structure_of(problem),
        **options,
    )


def at_random(problem, seed):
    x, _ = problem.init(Streams(seed))
    s = stream(seed, "at")
    return tree.map(lambda p: p + 0.5 * torch.randn(p.shape, generator=s, dtype=p.dtype), x)


# ---- maps


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
    assert "no contraction" in ends[1]
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


def test_iterating_the_map():
    p = Recurrent(0)
    y0 = {"y": torch.zeros(6, dtype=torch.float64)}
    solved = solve_lower(
        p.lower_loss, p.x, y0, solver=Iterate(steps=500, tolerance=1e-12), structure=structure_of(p)
    )
    assert solved.stats.converged
    assert solved.stats.gradients == solved.stats.steps < 500
    assert_close(solved.y, p.solved(), rtol=1e-11)
    few = solve_lower(
        p.lower_loss, p.x, y0, solver=Iterate(steps=3, tolerance=1e-12), structure=structure_of(p)
    )
    y = y0
    for _ in range(3):
        last, y = y, p.lower_map(p.x, y, None)
    assert torch.equal(few.y["y"], y["y"])
    assert not few.stats.converged
    assert few.stats.gradient_norm == pytest.approx(float((y["y"] - last["y"]).norm()))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x, y, b: {"y": y["y"][:2]}, "lower_map returned"),
        (lambda x, y, b: {"z": y["y"]}, "names and shapes of y"),
        (lambda x, y, b: {"y": y["y"].detach()}, "depends on neither x nor y"),
    ],
)
def test_a_map_that_is_none_is_refused(broken, message):
    p = Recurrent(0)
    p.lower_map = broken  # pyright: ignore
    p.lower_loss = lambda x, y, b: sum((part**2).sum() for part in y.values())  # pyright: ignore
    with pytest.raises(ProblemError, match=message):
        ask(p, p.x, {"y": p.t}, FixedPoint())


def test_iterate_without_a_map_says_so():
    q = Quadratic()
    x, y = q.init(Streams(0))
    with pytest.raises(ProblemError, match="no map to iterate"):
        solve_lower(q.lower_loss, x, y, solver=Iterate(), batch=q.constants)


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


# ---- gradient steps, projections, proximal maps


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("solver", [MINRES(iterations=300, tolerance=1e-13), Dense()], ids=repr)
def test_kkt_agrees_with_the_closed_form_of_the_box(solver, seed):
    p = BoxQP(data_seed=seed)
    x = at_random(p, seed)
    got = ask(p, x, p.lower_solution(x), KKT(solver=solver))
    assert_close(got.hypergradient, p.hypergradient(x), rtol=1e-9)
    assert (got.stats.gradients, got.stats.cross_products, got.stats.degenerate) == (3, 1, 0)


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


# an equality that x moves, by hand: y* = A⁻¹(c + Cᵀμ'), C y = d + E x


class Affine:
    """½ yᵀAy − cᵀy over C y = d + E x; the projection is that onto the affine set, so a prox."""

    def __init__(self, seed=0):
        s = stream(seed, "affine")
        draw = lambda *n: torch.randn(*n, generator=s, dtype=torch.float64)  # noqa: E731
        M = draw(7, 7)
        self.A, self.c, self.t = (
            M @ M.T / 7 + 0.5 * torch.eye(7, dtype=M.dtype),
            draw(7),
            draw(7) + 2,
        )
        self.C, self.d, self.E = draw(3, 7), draw(3), draw(3, 4)

    def upper_loss(self, x, y, batch):
        return 0.5 * ((y["y"] - self.t) ** 2).sum() + (x["x"] ** 2).sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * y["y"] @ self.A @ y["y"] - self.c @ y["y"]

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def lower_constraints(self, x, y, batch):
        return {"equality": self.C @ y["y"] - self.d - self.E @ x["x"]}

    def prox_lower(self, x, y, step):
        gap = self.C @ y["y"] - self.d - self.E @ x["x"]
        return {"y": y["y"] - self.C.T @ torch.linalg.solve(self.C @ self.C.T, gap)}

    def closed(self, x):
        """(y*, dΦ/dx): y* = A⁻¹(c + Cᵀ S⁻¹(r − C A⁻¹ c)), S = C A⁻¹ Cᵀ, r = d + E x."""
        inverse = torch.linalg.inv(self.A)
        S = self.C @ inverse @ self.C.T
        response = inverse @ self.C.T @ torch.linalg.solve(S, self.E)
        r = self.d + self.E @ x
        y = inverse @ (self.c + self.C.T @ torch.linalg.solve(S, r - self.C @ inverse @ self.c))
        return {"y": y}, {"x": 2 * x + response.T @ (y - self.t)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "estimator",
    [
        KKT(solver=Dense()),
        KKT(solver=MINRES(iterations=200, tolerance=1e-13)),
        FixedPoint(solver=EXACT),
    ],
    ids=["kkt dense", "kkt minres", "fixed point"],
)
def test_an_equality_that_x_moves(estimator, seed):
    p, x = Affine(seed), torch.linspace(-1, 2, 4, dtype=torch.float64)
    y, truth = p.closed(x)
    got = ask(p, {"x": x}, y, estimator)
    assert_close(got.hypergradient, truth, rtol=1e-9)
    assert got.stats.converged


def test_curvature_along_the_constraints_is_reported():
    p, x = Affine(0), torch.ones(4, dtype=torch.float64)
    y, _ = p.closed(x)
    _, _, Vh = torch.linalg.svd(p.C)
    free = Vh[3:].T @ Vh[3:]
    smallest = float(torch.linalg.eigvalsh(Vh[3:] @ p.A @ Vh[3:].T)[0])
    got = ask(p, {"x": x}, y, KKT(solver=Dense()))
    assert got.stats.curvature >= smallest - 1e-10
    p.A = p.A - 20 * free  # bends down wherever y may go; y stays stationary as c follows
    p.c = p.c - 20 * free @ y["y"]
    got = ask(p, {"x": x}, y, KKT(solver=Dense()))
    assert got.stats.curvature < 0


@pytest.mark.parametrize(
    "estimator", [FixedPoint(solver=EXACT), KKT(solver=Dense())], ids=["fixed point", "kkt"]
)
@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_a_multiplier_of_zero_is_flagged(estimator, shift):
    p = BoxQP()
    x = at_random(p, 0)
    y = p.lower_solution(x)
    assert ask(p, x, y, estimator).stats.degenerate == 0
    k = p.constants
    y = torch.linalg.solve(k["A"], k["B"] @ x["x"] + k["c"])
    p = BoxQP(bound=float(y.abs().max()) + shift)  # the set now only just touches y*
    got = ask(p, x, p.lower_solution(x), estimator)
    assert got.stats.degenerate >= 1
    assert got.stats.converged is False


def test_dependent_constraints_are_flagged():
    p, x = Affine(0), torch.ones(4, dtype=torch.float64)
    y, truth = p.closed(x)
    once = p.lower_constraints
    p.lower_constraints = lambda x, y, b: {"equality": once(x, y, b)["equality"].repeat(2)}  # pyright: ignore
    got = ask(p, {"x": x}, y, KKT(solver=MINRES(iterations=200)))
    assert got.stats.degenerate == 3
    assert got.stats.converged is False
    assert_close(got.hypergradient, truth, rtol=1e-4)  # the least-norm solution is still right


def test_a_y_that_is_not_solved_is_flagged_where_the_active_set_is_in_doubt():
    p = BoxQP()
    x = at_random(p, 0)
    y = p.project_lower(
        tree.axpy(0.3, tree.map(torch.ones_like, p.lower_solution(x)), p.lower_solution(x))
    )
    assert ask(p, x, y, FixedPoint(solver=EXACT)).stats.converged is False


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
    with pytest.raises(ConvergenceError, match="no contraction"):
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
    assert got.stats.residual > 1e-3


# ---- the proximal solver


@pytest.mark.parametrize("make", [BoxQP, Lasso])
@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("lr", [0.3, 100.0])
def test_the_proximal_solver_reaches_the_closed_form(make, accelerate, lr):
    p = make()
    x = at_random(p, 0)
    _, y = p.init(Streams(0))
    solver = Proximal(steps=3000, lr=lr, tolerance=1e-12, accelerate=accelerate)
    got = solve_lower(
        p.lower_loss,
        x,
        y,
        solver=solver,
        batch=next(p.lower_batches(None)),
        project=getattr(p, "project_lower", None),
        structure=structure_of(p),
    )
    assert got.stats.converged
    assert_close(got.y, p.lower_solution(x), rtol=1e-9)
    assert got.stats.gradients == got.stats.steps
    assert (got.state["lr"] < lr) is (lr == 100.0)


def test_momentum_with_restarts_needs_fewer_steps_on_an_ill_conditioned_problem():
    q = Quadratic(condition=1e3)
    x, y = q.init(Streams(0))
    steps = {}
    for accelerate in (True, False):
        solver = Proximal(steps=100_000, tolerance=1e-8, accelerate=accelerate)
        steps[accelerate] = solve_lower(
            q.lower_loss, x, y, solver=solver, batch=q.constants
        ).stats.steps
    # κ log(1/ε) against √κ log(1/ε)
    assert steps[True] < 0.1 * steps[False]


def test_one_plain_proximal_step_by_hand():
    p = Lasso()
    x = at_random(p, 0)
    batch = next(p.lower_batches(None))
    w = torch.linspace(-1, 1, 20, dtype=torch.float64)
    g = batch["A"].T @ (batch["A"] @ w - batch["b"]) / len(batch["b"])
    z = w - 0.01 * g
    level = 0.01 * x["log_penalty"].exp()
    expected = torch.where(z > level, z - level, torch.where(z < -level, z + level, 0.0))
    got = solve_lower(
        p.lower_loss,
        x,
        {"w": w},
        solver=Proximal(steps=1, lr=0.01),
        batch=batch,
        structure=structure_of(p),
    )
    torch.testing.assert_close(got.y["w"], expected, rtol=1e-14, atol=0)


def test_accelerated_steps_by_hand():
    """t = 1, (1 + √5) / 2, …: each step starts ahead of y by (t − 1) / t₊ of the last change."""
    k = Quadratic(condition=1e3).constants
    x, y0 = torch.ones(5, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    lr, t = 0.01, 1.0
    y, z = y0, y0
    for _ in range(6):
        after = z - lr * (k["A"] @ z - k["B"] @ x - k["c"])
        assert float((after - z) @ (after - y)) > 0, "no restart so early"
        t, weight = (1 + math.sqrt(1 + 4 * t * t)) / 2, t - 1
        y, z = after, after + weight / t * (after - y)
    got = solve_lower(
        Quadratic(condition=1e3).lower_loss,
        {"x": x},
        {"y": y0},
        solver=Proximal(steps=6, lr=lr),
        batch=k,
    )
    torch.testing.assert_close(got.y["y"], y, rtol=1e-13, atol=1e-14)


def test_iterate_refuses_a_projection():
    p = Recurrent(0)
    with pytest.raises(ProblemError, match="iterate cannot keep y in the set"):
        solve_lower(
            p.lower_loss,
            p.x,
            {"y": p.t},
            solver=Iterate(),
            structure=structure_of(p),
            project=lambda y: y,
        )


# ---- what a run does with them


class Both(Lasso):
    def project_lower(self, y):
        return y


class Loose(BoxQP):
    project_lower = property()  # pyright: ignore


def made(problem, **options):
    parts = {
        "lower": Proximal(),
        "upper": Upper(steps=2, optimizer=SGD(lr=0.1)),
        "estimator": FixedPoint(),
    }
    return Setup(problem, **{**parts, **options}, dtype=torch.float64)


def warnings(setup):
    return [e.kind for e in engine.run(setup, engine.start(setup)) if isinstance(e, Warned)]


def test_only_what_does_not_know_is_cautioned_about():
    assert "projection" not in warnings(made(BoxQP()))
    assert "projection" not in warnings(made(BoxQP(), estimator=KKT()))
    assert "projection" in warnings(made(BoxQP(), estimator=Implicit()))
    assert "projection" not in warnings(made(Lasso()))
    assert "projection" in warnings(made(Lasso(), estimator=Implicit()))


def of_python(problem, estimator, **held):
    x = at_random(problem, 0)
    return hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        problem.lower_solution(x),
        estimator=estimator,
        upper_batch=next(problem.upper_batches(None)),
        lower_batch=next(problem.lower_batches(None)),
        **held,
    )


@pytest.mark.parametrize("estimator", [Implicit(), LancBiO(), Penalty(), Implicit(error=1e-3)])
def test_what_holds_y_is_not_passed_over_from_python(estimator):
    box, lasso = BoxQP(), Lasso()
    with pytest.raises(
        ProblemError, match=r"does not know project, .*FixedPoint.*leave project out"
    ):
        of_python(box, estimator, project=box.project_lower)
    with pytest.raises(ProblemError, match=r"does not know structure\.prox"):
        of_python(lasso, estimator, structure=structure_of(lasso))
    with pytest.raises(ProblemError, match=r"does not know structure\.constraints.*use KKT"):
        of_python(box, estimator, structure=structure_of(box))
    of_python(box, estimator)  # on the user's word that nothing holds y there


def test_what_knows_or_claims_another_function_is_not_refused():
    box = BoxQP()
    of_python(box, FixedPoint(), project=box.project_lower)
    of_python(box, KKT(), project=box.project_lower, structure=structure_of(box))
    of_python(box, OneStep(), project=box.project_lower)  # claims the step, and no more
    with pytest.raises(ProblemError, match="KKT does not know project"):
        of_python(box, KKT(), project=box.project_lower)


def test_whoever_ignores_the_proximal_map_is_refused():
    for estimator in (Implicit(), KKT(), Unroll()):
        with pytest.raises(ProblemError, match=r"does not know prox_lower.*estimator: fixed_point"):
            engine.refuse_mismatch(made(Lasso(), estimator=estimator))
    for estimator in (FixedPoint(), Alternating()):  # the latter differentiates no lower level
        engine.refuse_mismatch(made(Lasso(), estimator=estimator))


def test_a_doubtful_active_set_is_a_warning():
    few = Proximal(steps=1, lr=0.1)
    assert "degenerate" in warnings(made(BoxQP(bound=0.2), lower=few))
    assert "degenerate" not in warnings(made(BoxQP(bound=0.2)))


def test_a_lower_solver_that_would_ignore_the_proximal_map_is_refused():
    with pytest.raises(ProblemError, match="lower: proximal"):
        engine.refuse_mismatch(made(Lasso(), lower=Gradient()))
    p = Lasso()
    x, y = p.init(Streams(0))
    with pytest.raises(ProblemError, match="Proximal"):
        solve_lower(p.lower_loss, x, y, solver=Gradient(), structure=structure_of(p))
    engine.refuse_mismatch(made(Lasso()))


def test_two_maps_that_do_not_compose_are_refused():
    with pytest.raises(ProblemError, match="both project_lower and prox_lower"):
        warnings(made(Both()))


def test_constraints_that_nothing_keeps_are_refused():
    with pytest.raises(ProblemError, match="neither project_lower nor prox_lower"):
        engine.refuse_mismatch(made(Loose()))


def test_kkt_without_constraints_or_with_wrong_ones_says_so():
    q = Quadratic()
    x = at_random(q, 0)
    with pytest.raises(ProblemError, match="no constraints to hold"):
        ask(q, x, q.lower_solution(x), KKT())
    for wrong in ({"equal": x["x"]}, {"equality": x["x"].sum()}):
        structure = Structure(constraints=lambda x, y, b, wrong=wrong: wrong)
        with pytest.raises(ProblemError, match="expected vectors"):
            hypergradient(
                q.upper_loss,
                q.lower_loss,
                x,
                q.lower_solution(x),
                estimator=KKT(),
                upper_batch=q.constants,
                lower_batch=q.constants,
                structure=structure,
            )


def test_kkt_is_tight_with_a_multiplier_for_each_unknown():
    """The system has as many unknowns more as constraints are active, up to dim(y)."""
    assert KKT().tight(30).solver == MINRES().tight(60)
    p = Affine(0)
    p.C, p.d, p.E = torch.eye(7, dtype=p.A.dtype), torch.ones(7, dtype=p.A.dtype), p.A[:, :4]
    y, truth = p.closed(torch.ones(4, dtype=p.A.dtype))
    got = ask(p, {"x": torch.ones(4, dtype=p.A.dtype)}, y, KKT().tight(7))
    assert_close(got.hypergradient, truth, rtol=1e-9)
    assert got.stats.converged


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


def test_a_curved_constraint():
    """−(c + x d)ᵀy on the unit sphere: y* = u / ‖u‖, u = c + x d, and μ = ‖u‖ / 2 bends L."""
    s = stream(0, "sphere")
    c, d, t = (torch.randn(4, generator=s, dtype=torch.float64) for _ in range(3))
    x = torch.tensor([0.6], dtype=torch.float64)
    u = c + x * d
    y = u / u.norm()
    got = hypergradient(
        lambda x, y, b: 0.5 * ((y["y"] - t) ** 2).sum(),
        lambda x, y, b: -(c + x["x"] * d) @ y["y"],
        {"x": x},
        {"y": y},
        estimator=KKT(solver=Dense()),
        structure=Structure(constraints=lambda x, y, b: {"equality": (y["y"] @ y["y"])[None] - 1}),
    )
    response = (d - y * (y @ d)) / u.norm()
    assert_close(got.hypergradient, {"x": ((y - t) @ response)[None]}, rtol=1e-12)


class Boasts:
    """Returns b and says that it has solved."""

    tolerance = 1e-6

    def solve(self, matvec, b, start):
        return Solve(b, Stats(residual=0.0, converged=True))


def test_a_solver_that_only_says_it_has_converged_is_found_out():
    p = Recurrent(0)
    got = ask(p, p.x, p.solved(), FixedPoint(solver=Boasts()))
    assert got.stats.converged is False
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


@pytest.mark.parametrize(("pull", "doubtful"), [(1.0015e-3, 1), (1.0025e-3, 0)])
def test_a_multiplier_is_measured_by_the_gradient_it_balances(pull, doubtful):
    """½‖y‖² − xᵀy over y₁ ≤ 0 and y₂ = 0, at y = 0: μ = x, and 1e-6 (1 + ‖x‖) is 1.002e-3."""
    got = hypergradient(
        lambda x, y, b: (y["y"] - 1).square().sum() + x["x"].square().sum(),
        lambda x, y, b: 0.5 * y["y"] @ y["y"] - x["x"] @ y["y"],
        {"x": torch.tensor([pull, 1001.0], dtype=torch.float64)},
        {"y": torch.zeros(2, dtype=torch.float64)},
        estimator=KKT(solver=Dense()),
        structure=Structure(
            constraints=lambda x, y, b: {"inequality": y["y"][:1], "equality": y["y"][1:]}
        ),
    )
    assert got.stats.degenerate == doubtful


@pytest.mark.parametrize(("share", "kinks"), [(0.99, 1), (1.01, 0)])
@pytest.mark.parametrize("lr", [0.25, 1.0, 4.0])
def test_how_near_to_a_kink_is_near_goes_with_the_step_and_the_size_of_y(share, kinks, lr):
    """‖y − x‖² / 2 lr over y ≤ 1000: the step leads to x, a `share` of the margin from the bound."""
    margin = 1e-6 * min(1.0, lr) * 1001
    x = torch.tensor([1000.0 + share * margin], dtype=torch.float64)
    y = torch.tensor([1000.0], dtype=torch.float64)
    loss = Loss(
        lambda x, y, b: (y["y"] - x["x"]).square().sum() / (2 * lr), None, Counts(), "lower"
    )
    at = Point({"x": x}, {"y": y}, project=lambda z: tree.map(lambda p: p.clamp(max=1000.0), z))
    step = linearize_map(loss, at, lr)
    assert not step.shift["y"].any(), "y is the fixed point"
    assert step.kinks(1e-6) == kinks
