"""Starts of the lower level that depend on x are differentiated through."""

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.errors import ProblemError
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.estimators.zeroth_order import ZerothOrder
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.run.engine import run, start
from bilevel.testing import check
from tests.cases import assert_close, relative
from tests.estimators.starts import LR, STARTS, K, X, ask, fit, lower, setup, solved, upper


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
    assert_close(ask(Unroll(last=K - 1), kept).hypergradient, expected, rtol=1e-12)
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
    got = hypergradient(above, both, x, solution, estimator=Unroll())
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
        hypergradient(plain, plain, at, solution, estimator=Implicit())
    for estimator in UNROLLED:
        got = hypergradient(plain, plain, at, solution, estimator=estimator)
        assert tree.norm(got.hypergradient) > 1e-3
