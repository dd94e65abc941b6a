"""What single-loop methods settle at, how they tell, and runs of them."""

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, rng, tree
from bilevel.directions.average import Average
from bilevel.directions.saga import Saga
from bilevel.directions.spider import Spider
from bilevel.directions.storm import Storm
from bilevel.estimators.single_loop import SingleLoop
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.registry.build import build
from bilevel.run.engine import Setup, restore, run, start
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check, check_estimator
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.simulated_quadratic import SimulatedQuadratic


@pytest.mark.parametrize(
    ("options", "fresh"),
    [
        ({}, False),
        ({"lower_steps": 2}, True),
        ({"order": "sequential"}, True),
        ({"adjoint": "series", "adjoint_steps": 3}, True),
        ({"upper_direction": Storm()}, False),
        ({"upper_direction": Average()}, False),
        ({"upper_direction": Saga()}, True),
        ({"lower_direction": Spider()}, True),
    ],
    ids=str,
)
def test_batches_of_its_own_are_asked_for_where_they_are_drawn(options, fresh):
    """Saga and Spider have to be told blocks, which only batches that are drawn have."""
    estimator = SingleLoop(**options)
    assert estimator.needs.fresh is fresh
    tight = estimator.tight(3)
    assert all(not d.by_block for d in (tight.lower_direction, tight.upper_direction))


def quadratic_setup(problem, estimator, steps=1):
    upper = Upper(steps=steps, optimizer=SGD(lr=0.1))
    return Setup(problem, Gradient(), upper, estimator, dtype=torch.float64)


def verdicts(problem, names, **options):
    setup = quadratic_setup(problem, SingleLoop())
    asked = {n: build("estimators", {"name": n, **options}) for n in names}
    return {row.name: row.verdict for row in check(setup, asked) if isinstance(row, CheckRow)}


def test_what_they_settle_at_is_the_hypergradient():
    small, long = Quadratic(num_lower=4, condition=4.0), {"lower_lr": 0.8, "adjoint_lr": 0.8}
    found = verdicts(small, ["soba", "amigo", "fsla", "ma_soba"], **long)
    assert set(found.values()) == {"exact"}
    whole = SimulatedQuadratic(num_lower=4, upper_samples=64, lower_samples=512)
    assert set(verdicts(whole, ["saba", "srba"], **long).values()) == {"exact"}
    kept = {"lower_steps": 400, "tolerance": 1e-9}  # their own directions, which tight replaces
    for name in ("saba", "srba"):
        estimator = build("estimators", {"name": name, **long, **kept})
        assert at_rest(estimator, whole) < 1e-7
    assert set(verdicts(small, ["stocbio", "sustain"]).values()) == {"approximate"}


def at_rest(estimator, problem):
    """The relative error after all steps of one call at y*."""
    x = tree.map(lambda e: e + 1.0, problem.init(rng.Streams(0))[0])
    batch = next(problem.lower_batches(rng.stream(0, "")))
    other = next(problem.upper_batches(rng.stream(0, "")))
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        problem.lower_solution(x),
        estimator=estimator,
        upper_batch=other,
        lower_batch=batch,
        batches=(itertools.repeat(other), itertools.repeat(batch)),
    )
    truth = problem.hypergradient(x)
    return tree.norm(tree.sub(got.hypergradient, truth)) / tree.norm(truth)


@pytest.mark.parametrize("name", ["soba", "fsla", "mrbo"])
def test_they_hold_the_contract_of_estimators(name):
    estimator = build("estimators", {"name": name, "lower_lr": 0.3, "adjoint_lr": 0.3})
    check_estimator(estimator, seeds=(0,))


class Halved:
    """SOBA with a wrong adjoint step, which claims what SOBA does."""

    claim = "solution"

    def __init__(self, of):
        self.of, self.needs = of, of.needs

    def tight(self, dim):
        return Halved(self.of.tight(dim))

    def init(self, at):
        return self.of.init(at)

    def estimate(self, losses, at, state):
        function = losses.upper.function
        half = replace(losses.upper, function=lambda x, y, b: function(x, y, b) / 2)
        return self.of.estimate(replace(losses, upper=half), at, state)


def test_and_a_wrong_one_is_told():
    setup = quadratic_setup(Quadratic(num_lower=4, condition=4.0), SingleLoop())
    rows = [
        r
        for r in check(setup, {"halved": Halved(SingleLoop(lower_lr=0.8, adjoint_lr=0.8))})
        if isinstance(r, CheckRow)
    ]
    assert rows[0].verdict == "wrong"


@pytest.mark.untrusted("a method that has not settled is its subject")
def test_rest_is_relative_to_the_size_of_F():
    """The adjoint's residual to ‖∇y F‖, and the change of d_x to d_x: 1e4 F settles as F does."""
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = problem.lower_solution(x), problem.constants

    def ask_for(size, steps):
        return hypergradient(
            lambda *at: size * problem.upper_loss(*at),
            problem.lower_loss,
            x,
            y,
            estimator=SingleLoop(lower_steps=steps, tolerance=1e-6, lower_lr=0.5, adjoint_lr=0.5),
            upper_batch=batch,
            lower_batch=batch,
            batches=(itertools.repeat(batch), itertools.repeat(batch)),
        ).stats

    few, many = (tuple(ask_for(size, steps) for size in (1.0, 1e4, 1e-4)) for steps in (3, 5000))
    assert few[0].residual > 0.01
    for stats in few:
        assert stats.residual == pytest.approx(few[0].residual, rel=1e-9)
    assert len({stats.iterations for stats in many}) == 1
    assert all(stats.converged for stats in many)


def test_y_at_rest_is_told_by_its_gradient():
    """With F blind to y, v and d_x rest from the first step: y alone says when to end."""
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = tree.scale(3.0, problem.lower_solution(x)), problem.constants
    got = hypergradient(
        lambda x, y, b: x["x"].square().sum() + 0.0 * y["y"].sum(),
        problem.lower_loss,
        x,
        y,
        estimator=SingleLoop(lower_steps=5000, tolerance=1e-6, lower_lr=0.5),
        upper_batch=batch,
        lower_batch=batch,
        batches=(itertools.repeat(batch), itertools.repeat(batch)),
    )
    assert 10 < got.stats.iterations < 1000
    assert got.moved is not None
    assert got.moved.gradient_norm <= 1e-6
    # the smallest curvature of G is the largest, 1, over the condition number
    off = tree.norm(tree.sub(got.moved.y, problem.lower_solution(x)))
    assert off <= 4.0 * 1e-6


@pytest.mark.untrusted("a method that has not settled is its subject")
def test_one_that_has_not_settled_says_so():
    problem = Quadratic(num_lower=4, condition=4.0)
    x = {"x": torch.ones(5, dtype=torch.float64)}
    y, batch = problem.lower_solution(x), problem.constants

    def ask_for(steps):
        return hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            y,
            estimator=SingleLoop(lower_steps=steps, tolerance=1e-8),
            upper_batch=batch,
            lower_batch=batch,
            batches=(itertools.repeat(batch), itertools.repeat(batch)),
        ).stats

    few, many = ask_for(3), ask_for(5000)
    assert few.converged is False
    assert few.residual > 0.1
    assert few.iterations == 3
    assert many.converged
    assert many.residual <= 1e-8
    assert many.iterations < 1500


SMALL = SimulatedQuadratic(
    num_upper=2, num_lower=3, upper_samples=8, lower_samples=16, batch_size=4
)


@pytest.mark.parametrize("name", ["saba", "srba", "vrbo", "sustain", "fsla"])
def test_a_resumed_run_is_the_whole_one(name):
    setup = quadratic_setup(SMALL, build("estimators", name), steps=7)
    whole = start(setup)
    list(run(setup, whole))
    half = replace(setup, upper=Upper(steps=3, optimizer=SGD(lr=0.1)))
    state = start(half)
    list(run(half, state))
    resumed = restore(setup, state.save())
    list(run(setup, resumed))
    for a, b in ((whole.x, resumed.x), (whole.y, resumed.y)):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_in_a_run_y_is_moved_by_the_estimator_alone():
    setup = quadratic_setup(SMALL, build("estimators", "soba"), steps=3)
    state = start(setup)
    first = (tree.clone(state.x)["x"], tree.clone(state.y)["y"])
    draws = [SMALL.lower_batches(rng.stream(0, "lower.batches")), None]
    draws[1] = SMALL.upper_batches(rng.stream(0, "upper.batches"))
    list(run(setup, state))
    x, y = first
    v = torch.zeros_like(y)
    for _ in range(3):
        g, f = next(draws[0]), next(draws[1])
        G_y = g["yy"] @ y + x @ g["xy"] + g["y"]
        F_x, F_y = f["xx"] @ x + f["xy"] @ y + f["x"], f["yy"] @ y + x @ f["xy"] + f["y"]
        d_v, h = g["yy"] @ v - F_y, F_x - g["xy"] @ v
        x, y, v = x - 0.1 * h, y - 0.1 * G_y, v - 0.1 * d_v
    torch.testing.assert_close(state.x["x"], x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.y["y"], y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.estimator["v"]["y"], v, rtol=1e-12, atol=1e-13)
