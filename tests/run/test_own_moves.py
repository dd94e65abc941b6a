"""Estimators that move y themselves, and those that draw batches of their own."""

import itertools
import math

import pytest
import torch

from bilevel import calculus, hypergradient, tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Estimate, Moved, Needs, Stats
from bilevel_problems.quadratic import Quadratic


@component
class Descends:
    """Takes one step on G itself; the direct gradient of F."""

    lr: float = 0.25

    needs = Needs(second_order=False, moves_lower=True)
    claim = None

    def init(self, at):
        return {"calls": 0}

    def estimate(self, losses, at, state):
        value, g = calculus.gradient_y(losses.lower.fresh(), at.x, at.y)
        F, F_x, _ = calculus.gradients(losses.upper, at)
        moved = Moved(tree.axpy(-self.lr, g, at.y), float(value), tree.norm(g))
        return Estimate(F_x, F, {"calls": state["calls"] + 1}, Stats(), moved)


class Held(Quadratic):
    def project_lower(self, y):
        return y


def setup(problem=None, **options):
    return Setup(
        problem=problem or Quadratic(),
        lower=Gradient(steps=7, optimizer=SGD(lr=0.5)),
        upper=Upper(steps=3, optimizer=SGD(lr=0.1)),
        estimator=Descends(**options),
        dtype=torch.float64,
    )


def test_the_run_leaves_y_to_the_estimator():
    made = setup()
    state = engine.start(made)
    x, y, k = state.x["x"].clone(), state.y["y"].clone(), made.problem.constants
    steps = [e for e in engine.run(made, state) if isinstance(e, Stepped)]
    for step in steps:
        g = k["A"] @ y - k["B"] @ x - k["c"]
        assert step.lower.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
        x = x - 0.1 * (made.problem.rho * (x - k["s"]) + k["D"].T @ y)
        y = y - 0.25 * g
    torch.testing.assert_close(state.y["y"], y, rtol=1e-12, atol=0)
    torch.testing.assert_close(state.x["x"], x, rtol=1e-12, atol=0)
    assert state.totals.gradients == 2 * len(steps), "no gradient of the lower solver"
    assert [step.lower.steps for step in steps] == [1, 1, 1]


def test_a_projection_that_would_not_be_kept_is_refused():
    with pytest.raises(ProblemError, match="project_lower"):
        engine.refuse_mismatch(setup(Held()))


def test_batches_of_its_own():
    seen = []

    def lower(x, y, batch):
        seen.append(batch)
        return ((y["y"] - batch * x["x"]) ** 2).sum()

    def upper(x, y, batch):
        return (y["y"] * x["x"]).sum()

    at = {"x": torch.ones(2)}, {"y": torch.ones(2)}
    options = {"estimator": Descends(), "lower_batch": 1.0}
    hypergradient(upper, lower, *at, **options, batches=((), itertools.count(5.0)))
    assert 5.0 in seen
    with pytest.raises(ProblemError, match="lower_batches"):
        hypergradient(upper, lower, *at, **options)
    hypergradient(upper, lambda x, y, b: lower(x, y, 1.0), *at, estimator=Descends())


def test_a_moved_y_comes_back_under_tied_names():
    one = torch.ones(2)

    def lower(x, y, batch):
        return ((y["a"] + y["b"] - x["x"]) ** 2).sum()

    got = hypergradient(
        lambda x, y, b: (y["a"] * x["x"]).sum(),
        lower,
        {"x": torch.zeros(2)},
        {"a": one, "b": one},
        estimator=Descends(),
    )
    assert got.moved is not None
    assert got.moved.y["a"] is got.moved.y["b"]
    assert math.isfinite(got.moved.loss)
