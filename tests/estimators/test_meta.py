"""Starts that depend on x, tasks in one batch, and the estimators of meta-learning."""

import itertools
import math

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators.fomaml import FOMAML
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.reptile import Reptile
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.problem.learned_start import LearnedStart
from bilevel.problem.over_tasks import OverTasks
from bilevel.recipe.build import build
from bilevel.rng import Streams, stream
from bilevel.run.engine import Setup, run, start
from bilevel.run.upper import Upper
from bilevel.testing import check
from tests.cases import assert_close, relative

K, LR = 5, 0.1


def draw(*shape):
    return torch.randn(*shape, generator=stream(0, f"meta {shape}"), dtype=torch.float64)


X = {"w": draw(4), "scale": 1 + 0.1 * draw(4)}
BATCH = {"a": draw(7, 4), "b": draw(7)}


def fit(y):
    return (torch.tanh(BATCH["a"] @ y) - BATCH["b"]).square().mean()


def lower(x, y, batch):
    """Not quadratic, so that the Hessian changes along the path; x enters beside the start."""
    return fit(y["w"]) + 0.1 * (x["scale"] * y["w"].square()).sum()


def upper(x, y, batch):
    return (y["w"] - 1).pow(4).sum() + (x["w"] * y["w"]).sum()


STARTS = {
    "x itself": lambda x: {"w": x["w"]},
    "a function of x": lambda x: {"w": torch.sin(x["w"]) * x["scale"]},
    "one that x has no part in": lambda x: {"w": torch.ones(4, dtype=torch.float64)},
}


def by_hand(restart, steps=K, lr=LR):
    """Autograd through a loop written out here."""
    x = tree.leaves(X)
    y = 1.0 * restart(x)["w"]
    y = y if y.requires_grad else y.requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(lower(x, {"w": y}, None), y, create_graph=True)
        y = y - lr * g
    F = upper(x, {"w": y}, None)
    return dict(zip(x, torch.autograd.grad(F, list(x.values())), strict=True))


def solved(restart, steps=K, optimizer=None):
    solver = Gradient(steps=steps, optimizer=optimizer or SGD(lr=LR))
    return solve_lower(lower, X, restart, solver=solver, record=True)


def ask(estimator, solution, x=X):
    return hypergradient(upper, lower, x, solution.y, estimator=estimator, path=solution.path)


UNROLLED = [Unroll(), Unroll(memory="recompute"), Unroll(memory="checkpoint"), Forward()]


@pytest.mark.parametrize("restart", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("estimator", UNROLLED, ids=repr)
def test_the_start_is_differentiated_through(estimator, restart):
    got = ask(estimator, solved(restart))
    assert_close(got.hypergradient, by_hand(restart), rtol=1e-12)


@pytest.mark.parametrize("estimator", UNROLLED, ids=repr)
def test_a_start_that_is_held_fixed_is_told_apart(estimator):
    """Negative control: without the function of x the same path gives something else."""
    solution = solve_lower(
        lower, X, {"w": X["w"]}, solver=Gradient(steps=K, optimizer=SGD(lr=LR)), record=True
    )
    assert relative(ask(estimator, solution).hypergradient, by_hand(STARTS["x itself"])) > 1e-2


@pytest.mark.parametrize("estimator", UNROLLED, ids=repr)
def test_a_path_recorded_at_another_x_begins_anew_at_this_one(estimator):
    restart = STARTS["a function of x"]
    elsewhere = tree.map(lambda p: p + 0.3, X)
    solver = Gradient(steps=K, optimizer=SGD(lr=LR))
    solution = solve_lower(lower, elsewhere, restart, solver=solver, record=True)
    assert_close(ask(estimator, solution).hypergradient, by_hand(restart), rtol=1e-12)


def test_no_steps_at_all():
    """K = 0 leaves F(x, y_0(x))."""
    restart = STARTS["a function of x"]
    solution = solve_lower(lower, X, restart, solver=Gradient(steps=3, tolerance=1e9), record=True)
    assert not solution.path.batches
    for estimator in UNROLLED:
        got = ask(estimator, solution)
        assert_close(got.hypergradient, by_hand(restart, steps=0), rtol=1e-12)


def test_modes_agree_with_momentum_and_adam():
    for optimizer in (SGD(lr=LR, momentum=0.9), Adam(lr=LR)):
        solution = solved(STARTS["x itself"], 7, optimizer)
        first, *others = [ask(estimator, solution).hypergradient for estimator in UNROLLED]
        for other in others:
            assert_close(other, first, rtol=1e-12)


def test_truncation_holds_the_start_fixed():
    restart = STARTS["x itself"]
    whole = solved(restart)
    cut = Gradient(steps=K, optimizer=SGD(lr=LR))
    kept = solve_lower(lower, X, restart, solver=cut, record=K - 1)
    assert kept.path.restart is None
    expected = ask(Unroll(last=K - 1), whole).hypergradient
    assert_close(ask(Unroll(), kept).hypergradient, expected, rtol=1e-12)
    assert relative(expected, by_hand(restart)) > 1e-2
    all_of_it = ask(Unroll(last=K + 3), whole).hypergradient
    assert_close(all_of_it, by_hand(restart), rtol=1e-12)


def test_differences_of_values_see_the_start():
    """Zeroth order has no claim on exactness, but its mean is right: within 4 standard errors."""
    restart, seeds = STARTS["x itself"], range(40)
    solution = solved(restart)
    draws = [
        tree.flatten(ask(ZerothOrder(samples=20, smoothing=1e-4, seed=s), solution).hypergradient)
        for s in seeds
    ]
    found = torch.stack(draws)
    off = found.mean(0) - tree.flatten(by_hand(restart))
    assert (off.abs() <= 4 * found.std(0) / len(draws) ** 0.5).all()


def test_tied_names_keep_their_start():
    one = X["w"]
    x = {"a": one, "b": one}

    def both(x, y, batch):
        return lower({"scale": x["a"]}, {"w": y["w"] + y["v"]}, None)

    def above(x, y, batch):
        return upper({"w": x["a"]}, {"w": y["v"]}, None)

    def restart(x):
        return {"w": x["b"], "v": 2 * x["a"]}

    solver = Gradient(steps=2, optimizer=SGD(lr=LR))
    solution = solve_lower(both, x, restart, solver=solver, record=True)
    got = hypergradient(above, both, x, solution.y, estimator=Unroll(), path=solution.path)
    leaf = one.clone().requires_grad_()
    w, v = 1.0 * leaf, 2 * leaf
    for _ in range(2):
        value = both({"a": leaf, "b": leaf}, {"w": w, "v": v}, None)
        g = torch.autograd.grad(value, [w, v], create_graph=True)
        w, v = w - LR * g[0], v - LR * g[1]
    (expected,) = torch.autograd.grad(above({"a": leaf}, {"v": v}, None), leaf)
    assert_close(got.hypergradient, {"a": expected, "b": expected}, rtol=1e-12)


class Starts:
    """The problem above, whose lower level starts at a function of x."""

    def __init__(self, lower_start):
        self.lower_start = lower_start

    def init(self, streams):
        return tree.clone(X), {"w": torch.zeros(4)}

    def upper_loss(self, x, y, batch):
        return upper(x, y, batch)

    def lower_loss(self, x, y, batch):
        return lower(x, y, batch)

    def upper_batches(self, stream):
        while True:
            yield None

    lower_batches = upper_batches


def setup(problem, estimator=None, steps=K):
    return Setup(
        problem,
        Gradient(steps=steps, optimizer=SGD(lr=LR)),
        Upper(steps=2, optimizer=SGD(lr=0.1)),
        estimator or Unroll(),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("estimator", UNROLLED, ids=repr)
def test_a_run_differentiates_through_lower_start(estimator):
    restart = STARTS["a function of x"]
    made = setup(Starts(lambda x, y: restart(x)), estimator)
    state = start(made)
    steps = [e for e in run(made, state) if isinstance(e, Stepped)]
    assert steps[0].hypergradient_norm == pytest.approx(tree.norm(by_hand(restart)), rel=1e-12)


def test_check_holds_it_to_the_moving_start():
    made = setup(Starts(lambda x, y: {"w": torch.sin(x["w"])}))
    rows = list(check(made, {"unroll": Unroll(), "last": Unroll(last=2), "forward": Forward()}))
    assert [row.verdict for row in rows] == ["as claimed"] * 3
    assert all(row.claim_error < 1e-7 for row in rows)


class Fixed(Unroll):
    """Unrolling that forgets the start."""

    def path(self, losses, at):
        path = super().path(losses, at)
        return type(path)(path.optimizer, path.start, path.state, path.batches)

    def objective(self, losses, at):
        return Unroll.objective(Unroll(), losses, at)


def test_check_catches_a_start_that_is_forgotten():
    made = setup(Starts(lambda x, y: {"w": torch.sin(x["w"])}))
    (row,) = check(made, {"fixed": Fixed()})
    assert row.verdict == "wrong"


def test_an_x_that_only_starts_the_lower_level_is_refused_where_it_is_forgotten():
    def plain(x, y, batch):
        return fit(y["w"]) + y["w"].square().sum()

    at = {"w": X["w"]}
    solver = Gradient(steps=2, optimizer=SGD(lr=LR))
    solution = solve_lower(plain, at, lambda x: x, solver=solver, record=True)
    with pytest.raises(ProblemError, match="where the lower level starts"):
        hypergradient(plain, plain, at, solution.y, estimator=Implicit(), path=solution.path)
    for estimator in UNROLLED:
        got = hypergradient(plain, plain, at, solution.y, estimator=estimator, path=solution.path)
        assert tree.norm(got.hypergradient) > 1e-3


# the MAML family, on two tasks, against its formulas typed out -----------------------------------


@component
class Task:
    """Regression by tanh(a · y) on the task's data, from y_0 = x, held near x if `proximal`."""

    proximal: float = 0.0

    def init(self, streams):
        return {"w": X["w"]}, {"w": X["w"]}

    def lower_start(self, x, y):
        return {"w": x["w"]}

    def episodes(self, stream):
        while True:
            a = torch.randn(2, 6, 4, generator=stream, dtype=torch.float64)
            b = torch.randn(2, 6, generator=stream, dtype=torch.float64)
            yield (a[0], b[0]), (a[1], b[1])

    def upper_loss(self, x, y, batch):
        return error(y["w"], batch)

    def lower_loss(self, x, y, batch):
        return error(y["w"], batch) + 0.5 * self.proximal * (y["w"] - x["w"]).square().sum()

    def upper_batches(self, stream):
        return (upper for _, upper in self.episodes(stream))

    def lower_batches(self, stream):
        return (lower for lower, _ in self.episodes(stream))


def error(w, batch):
    a, b = batch
    return (torch.tanh(a @ w) - b).square().mean()


TWO = OverTasks(problem=Task(), num_tasks=2)
LOWER, UPPER = next(TWO.episodes(stream(0, "two tasks")))


def tasks():
    """The (shots, queries) of each."""
    for i in range(2):
        yield (LOWER[0][i], LOWER[1][i]), (UPPER[0][i], UPPER[1][i])


def adapted(shots, theta, lr=LR, steps=K):
    """φ after plain gradient steps from θ, with their graph."""
    phi = theta
    for _ in range(steps):
        (g,) = torch.autograd.grad(error(phi, shots), phi, create_graph=True)
        phi = phi - lr * g
    return phi


def learned(estimator, lr=LR, steps=K, problem=TWO):
    """The hypergradient of two tasks; `name` of a preset, or an estimator."""
    estimator = build("estimators", estimator) if isinstance(estimator, str) else estimator
    x, y = problem.init(Streams(0))
    solution = solve_lower(
        problem.lower_loss,
        x,
        lambda x: problem.lower_start(x, y),
        solver=Gradient(steps=steps, optimizer=SGD(lr=lr)),
        batch=LOWER,
        record=True,
    )
    return hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        solution.y,
        estimator=estimator,
        upper_batch=UPPER,
        lower_batch=LOWER,
        path=solution.path,
    )


def maml(lr=LR, steps=K):
    theta = X["w"].clone().requires_grad_()
    losses = [error(adapted(shots, theta, lr, steps), queries) for shots, queries in tasks()]
    return {"w": torch.autograd.grad((losses[0] + losses[1]) / 2, theta)[0]}


def fomaml():
    total = torch.zeros(4, dtype=torch.float64)
    for shots, queries in tasks():
        phi = adapted(shots, X["w"].clone().requires_grad_()).detach().requires_grad_()
        total += torch.autograd.grad(error(phi, queries), phi)[0] / 2
    return {"w": total}


def reptile():
    found = [adapted(shots, X["w"].clone().requires_grad_()).detach() for shots, _ in tasks()]
    return {"w": X["w"] - (found[0] + found[1]) / 2}


FORMULAS = {"maml": maml, "fomaml": fomaml, "reptile": reptile}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_textbook_formula(name):
    got = learned(name).hypergradient
    assert_close(got, FORMULAS[name](), rtol=1e-12)
    for other in FORMULAS.keys() - {name}:  # negative control: they are three different methods
        assert relative(got, FORMULAS[other]()) > 1e-2


def test_imaml_equals_its_formula():
    """Rajeswaran et al. (2019), lemma 1: mean of (I + ∇²L/λ)⁻¹ ∇(queries) at the solution."""
    strength = 4.0
    total = torch.zeros(4, dtype=torch.float64)
    problem = OverTasks(problem=Task(proximal=strength), num_tasks=2)
    for shots, queries in tasks():
        phi = X["w"].clone()
        for _ in range(400):  # to rounding: the steps contract by at least 0.6
            phi = phi.requires_grad_()
            (g,) = torch.autograd.grad(error(phi, shots), phi)
            phi = (phi - 0.1 * (g + strength * (phi - X["w"]))).detach()
        phi = phi.requires_grad_()
        (g,) = torch.autograd.grad(error(phi, shots), phi, create_graph=True)
        rows = [torch.autograd.grad(part, phi, retain_graph=True)[0] for part in g]
        matrix = torch.eye(4, dtype=torch.float64) + torch.stack(rows) / strength
        (query,) = torch.autograd.grad(error(phi, queries), phi)
        total += torch.linalg.solve(matrix, query) / 2
    solver = {"name": "cg", "iterations": 50, "tolerance": 1e-13}
    tight = build("estimators", {"name": "imaml", "solver": solver})
    got = learned(tight, steps=400, problem=problem)
    assert_close(got.hypergradient, {"w": total}, rtol=1e-10)
    assert (
        relative(learned("fomaml", steps=400, problem=problem).hypergradient, {"w": total}) > 0.05
    )
    usual = learned("imaml", steps=400, problem=problem).hypergradient
    assert relative(usual, {"w": total}) < 1e-2


def test_fomaml_leaves_maml_linearly_in_the_step_size():
    sizes = (1e-3, 1e-4)
    gaps = [relative(learned(FOMAML(), lr).hypergradient, maml(lr)) for lr in sizes]
    assert math.log10(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.02)


def test_what_they_cost():
    assert learned(FOMAML()).stats.gradients == 1
    got = learned(Reptile())
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (0, 0, 0)
    mean = torch.stack(
        [error(learned_y, q) for (_, q), learned_y in zip(tasks(), ys(), strict=True)]
    )
    assert float(got.value) == pytest.approx(float(mean.mean()), rel=1e-12)


def ys():
    return [adapted(shots, X["w"].clone().requires_grad_()).detach() for shots, _ in tasks()]


class _OnceOnly(torch.autograd.Function):
    """A square whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return 2 * value * grad


@pytest.mark.parametrize("estimator", [FOMAML(), Reptile(), Unroll()], ids=repr)
def test_first_order_ones_take_no_second_derivative(estimator):
    def loss(x, y, batch):
        return _OnceOnly.apply(y["w"] - 1).sum()

    at = {"w": torch.zeros(2, dtype=torch.float64)}
    solution = solve_lower(loss, at, lambda x: x, solver=Gradient(steps=2), record=True)
    options = {"estimator": estimator, "path": solution.path}
    if estimator.needs.second_order:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(loss, loss, at, solution.y, **options)
    else:
        hypergradient(loss, loss, at, solution.y, **options)


def test_without_a_start_to_learn_they_are_refused():
    for estimator in (FOMAML(), Reptile()):
        fixed = solve_lower(lower, X, {"w": X["w"]}, solver=Gradient(steps=2), record=True)
        with pytest.raises(ProblemError, match="does not depend on x: give the problem lower_st"):
            ask(estimator, fixed)
        with pytest.raises(ProblemError, match="no lower steps to follow"):
            hypergradient(upper, lower, X, {"w": X["w"]}, estimator=estimator)


@pytest.mark.parametrize("name", ["a function of x", "x itself", "one that x has no part in"])
def test_reptile_refuses_what_is_no_copy_of_x(name):
    """Also x itself where another entry of x enters the lower loss: it would never move."""
    with pytest.raises(ProblemError, match="is not copied into lower_start"):
        ask(Reptile(), solved(STARTS[name]))


# a lower level that is not convex ----------------------------------------------------------------


@component
class Sine:
    """The numerical example of Liu et al. (2021), arXiv:2110.00455, with n = 1, a = 2, c = 2.

    min (x − a)² + (y − a − c)² over y ∈ argmin sin(x + y − c): y = C + c − x for C = −π/2 + 2πk,
    so that F = (x − a)² + (C − x − a)², least at x = C / 2 with (C − 2a)² / 2; best is C = 3π/2.
    """

    def init(self, streams):
        x = torch.full((1,), -6.0, dtype=torch.float64)
        return {"x": x}, {"y": torch.zeros(1, dtype=torch.float64)}

    def upper_loss(self, x, y, batch):
        return ((x["x"] - 2).square() + (y["y"] - 4).square()).sum()

    def lower_loss(self, x, y, batch):
        return torch.sin(x["x"] + y["y"] - 2).sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    def lower_batches(self, stream):
        return itertools.repeat(None)

    def project_lower(self, y):
        return {"y": y["y"].clamp(-10, 10)}


def where_it_ends(problem, estimator):
    """(x, F there at the lower solution nearest to y) after 300 steps."""
    made = Setup(
        problem,
        Gradient(steps=15, optimizer=SGD(lr=0.3)),
        Upper(steps=300, optimizer=SGD(lr=0.1)),
        estimator,
        dtype=torch.float64,
    )
    state = start(made)
    for _ in run(made, state):
        pass
    x, y = float(state.x["x"]), float(state.y["y"])
    basin = -math.pi / 2 + 2 * math.pi * round((x + y - 2 + math.pi / 2) / (2 * math.pi))
    return x, (x - 2) ** 2 + (basin - x - 2) ** 2


def test_iaptt_leaves_the_basin_that_unrolling_is_caught_in():
    x_best, F_best = 3 * math.pi / 4, (3 * math.pi / 2 - 4) ** 2 / 2
    x, F = where_it_ends(LearnedStart(problem=Sine()), build("estimators", "iaptt"))
    assert x == pytest.approx(x_best, abs=2e-3)
    assert pytest.approx(F_best, abs=1e-4) == F


def test_unrolling_is_caught_there():
    _, F = where_it_ends(Sine(), Unroll())
    assert pytest.approx((-2.5 * math.pi - 4) ** 2 / 2, rel=1e-3) == F


def test_a_learned_start_alone_is_not_enough():
    _, F = where_it_ends(LearnedStart(problem=Sine()), Unroll())
    assert F > 10


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_the_pessimistic_path_ends_where_F_is_largest(memory):
    def hill(x, y, batch):
        """Largest along the way: y passes 1 on its path from 0 to 3."""
        return -((y["y"] - x["x"]).square()).sum()

    def well(x, y, batch):
        return 0.5 * (y["y"] - 3).square().sum()

    one = {"x": torch.ones(1, dtype=torch.float64)}

    def restart(x):
        return {"y": 0.1 * x["x"]}

    solver = Gradient(steps=8, optimizer=SGD(lr=0.25))
    solution = solve_lower(well, one, restart, solver=solver, record=True)
    got = hypergradient(
        hill,
        well,
        one,
        solution.y,
        estimator=Unroll(pessimistic=True, memory=memory),
        path=solution.path,
    )
    # y_k = 3 − 0.75ᵏ (3 − 0.1 x): 0.825, 1.369, ...; F = −(y_k − x)² is largest at k = 1
    assert got.stats.iterations == 1
    y, dy = 3 - 0.75 * 2.9, 0.75 * 0.1
    assert float(got.value) == pytest.approx(-((y - 1) ** 2), rel=1e-12)
    assert float(got.hypergradient["x"]) == pytest.approx(-2 * (y - 1) * (dy - 1), rel=1e-12)
    last = Unroll(pessimistic=True, memory=memory, last=3)
    options = {"estimator": last, "path": solution.path}
    late = hypergradient(hill, well, one, solution.y, **options)
    assert float(late.value) == pytest.approx(-((3 - 0.75**6 * 2.9 - 1) ** 2), rel=1e-12)


def test_check_holds_the_pessimistic_path_to_its_maximum():
    made = setup(LearnedStart(problem=Sine()), steps=4)
    rows = list(check(made, {"iaptt": build("estimators", "iaptt"), "forward": Forward()}))
    assert [row.verdict for row in rows] == ["as claimed"] * 2


def test_a_learned_start_keeps_what_the_problem_can_do():
    made = LearnedStart(problem=Sine())
    x, y = made.init(Streams(0))
    assert set(x) == {"x", "start.y"}
    assert made.lower_start(x, y)["y"] is x["start.y"]
    held = made.project_upper({"x": x["x"], "start.y": torch.full((1,), 99.0)})
    assert float(held["start.y"]) == 10
    assert torch.equal(held["x"], x["x"])
    assert float(made.project_lower({"y": torch.full((1,), 99.0)})["y"]) == 10
    assert not hasattr(made, "evaluate")
    assert not hasattr(made, "hypergradient")
    with pytest.raises(ValueError, match="says itself where its lower level starts"):
        LearnedStart(problem=Task())
