"""The estimators of meta-learning against their formulas, over tasks in one batch."""

import math

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators.fomaml import FOMAML
from bilevel.estimators.forward import Forward
from bilevel.estimators.reptile import Reptile
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.learned_start import LearnedStart
from bilevel.problem.over_tasks import OverTasks
from bilevel.registry.build import build
from bilevel.rng import Streams, stream
from tests.cases import assert_close, relative
from tests.estimators.shared import OnceOnly
from tests.estimators.starts import LR, STARTS, K, Sine, X, ask, lower, solved, upper


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
        solution,
        estimator=estimator,
        upper_batch=UPPER,
        lower_batch=LOWER,
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


@pytest.mark.parametrize("estimator", [FOMAML(), Reptile(), Unroll()], ids=repr)
def test_first_order_ones_take_no_second_derivative(estimator):
    def loss(x, y, batch):
        return OnceOnly.apply(y["w"] - 1).sum()

    at = {"w": torch.zeros(2, dtype=torch.float64)}
    solution = solve_lower(loss, at, lambda x: x, solver=Gradient(steps=2), record=True)
    assert estimator.needs.second_order is isinstance(estimator, Unroll)
    if estimator.needs.second_order:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(loss, loss, at, solution, estimator=estimator)
    else:
        hypergradient(loss, loss, at, solution, estimator=estimator)


def test_without_a_start_to_learn_they_are_refused():
    for estimator in (FOMAML(), Reptile()):
        fixed = solve_lower(lower, X, {"w": X["w"]}, solver=Gradient(steps=2), record=True)
        with pytest.raises(ProblemError, match="does not depend on x: give the problem lower_st"):
            ask(estimator, fixed)
        with pytest.raises(ProblemError, match="no lower steps to follow"):
            hypergradient(upper, lower, X, {"w": X["w"]}, estimator=estimator)


@pytest.mark.parametrize("estimator", [Unroll(), Forward()], ids=repr)
def test_what_is_advised_where_there_are_no_steps_helps(estimator):
    y = {"w": X["w"].clone()}
    remedy = r"pass as y what bilevel\.solve_lower\(\.\.\., record=True\) returns"
    with pytest.raises(ProblemError, match=remedy):
        hypergradient(upper, lower, X, y, estimator=estimator)
    y = solve_lower(lower, X, y, solver=Gradient(steps=2), record=True)
    assert hypergradient(upper, lower, X, y, estimator=estimator).hypergradient.keys() == X.keys()


@pytest.mark.parametrize("name", ["a function of x", "x itself", "one that x has no part in"])
def test_reptile_refuses_what_is_no_copy_of_x(name):
    """Also x itself where another entry of x enters the lower loss: it would never move."""
    with pytest.raises(ProblemError, match="is not copied into lower_start"):
        ask(Reptile(), solved(STARTS[name]))


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
