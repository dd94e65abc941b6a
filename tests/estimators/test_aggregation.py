"""Aggregated descent on both levels, against autograd and a counter-example."""

import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import CheckRow, check
from bilevel_problems.box_qp import BoxQP
from tests.cases import assert_close, relative
from tests.estimators.typed_out import Typed


def test_aggregation_equals_autograd_through_a_loop(here):
    case, start, _ = here
    estimator = Aggregation(steps=7, alpha=0.8, upper_lr=0.3, lower_lr=0.2)
    x = tree.leaves(case.x)
    y = start["y"].clone().requires_grad_()
    for k in range(7):
        alpha = 0.8 / (k + 1)
        F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
        G = case.problem.lower_loss(x, {"y": y}, case.lower_batch)
        (F_y,) = torch.autograd.grad(F, y, create_graph=True)
        (G_y,) = torch.autograd.grad(G, y, create_graph=True)
        y = y - alpha * 0.3 * F_y - (1 - alpha) * 0.2 * G_y
    F = case.problem.upper_loss(x, {"y": y}, case.upper_batch)
    (h,) = torch.autograd.grad(F, x["x"])
    got = case.estimate(estimator, start)
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    assert_close(got.moved.y, {"y": y.detach()}, rtol=1e-13)
    assert got.stats.gradients == 2 * 7 + 2
    assert (got.stats.hvps, got.stats.cross_products) == (2 * 7, 2 * 7)
    assert got.moved.gradient_norm == pytest.approx(
        float(Typed(case).G_y(y.detach()).norm()), rel=1e-12
    )
    other = case.estimate(replace(estimator, steps=6), start)
    assert relative(other.hypergradient, {"x": h}) > 1e-3  # control


def test_aggregation_projects_after_each_step_and_differentiates_through_it():
    problem, K = BoxQP(), 6
    estimator = Aggregation(steps=K, alpha=0.4, upper_lr=0.3, lower_lr=0.9)
    made = Setup(
        problem, Gradient(), Upper(steps=3, optimizer=SGD(lr=0.05)), estimator, dtype=torch.float64
    )
    state, k = engine.start(made), problem.constants
    x, y = state.x["x"].clone(), state.y["y"].clone()
    held = []
    for event in engine.run(made, state):
        if not isinstance(event, Stepped):
            continue
        x.requires_grad_()
        for step in range(K):
            alpha = 0.4 / (step + 1)
            F_y, G_y = y - k["t"], k["A"] @ y - k["B"] @ x - k["c"]
            y = (y - alpha * 0.3 * F_y - (1 - alpha) * 0.9 * G_y).clamp(-1.0, 1.0)
        F = 0.5 * (y - k["t"]).square().sum() + 0.05 * (x - k["s"]).square().sum()
        (h,) = torch.autograd.grad(F, x)
        held.append(int((y.detach().abs() == 1.0).sum()))
        x, y = (x - 0.05 * h).detach(), y.detach()
        assert event.upper_loss == pytest.approx(float(F.detach()), rel=1e-12)
        assert event.hypergradient_norm == pytest.approx(float(h.norm()), rel=1e-12)
        assert_close(state.x, {"x": x}, rtol=1e-12)
        assert_close(state.y, {"y": y}, rtol=1e-12)
    assert len(held) == 3
    assert all(0 < count < 10 for count in held)  # some of y on a bound, some free


def test_aggregation_in_a_box_is_what_it_claims():
    rows = check(
        Setup(BoxQP(), Gradient(), Upper(steps=1), Implicit(), dtype=torch.float64),
        {"aggregation": Aggregation(lower_lr=0.9)},
    )
    (row,) = [row for row in rows if isinstance(row, CheckRow)]
    assert (row.verdict, row.claim) == ("as claimed", "path")


class TwoMinima:
    """Liu et al. (2020): F = ½ (x − y₂)² + ½ (y₁ − 1)², G = ½ y₁² − x y₁. Every y₂ minimises G.

    The optimistic solution is x = 1, y = (1, 1).
    """

    def upper(self, x, y, batch):
        return 0.5 * (x["x"] - y["y"][1]) ** 2 + 0.5 * (y["y"][0] - 1) ** 2

    def lower(self, x, y, batch):
        return 0.5 * y["y"][0] ** 2 - x["x"] * y["y"][0]

    def lowest(self, estimator):
        """Where the estimate is 0, every lower solve starting at 0: it is affine in x here."""
        start = {"y": torch.zeros(2, dtype=torch.float64)}

        def h(x):
            at = {"x": torch.tensor(x, dtype=torch.float64)}
            got = hypergradient(self.upper, self.lower, at, start, estimator=estimator)
            return float(got.hypergradient["x"])

        root = h(0.0) / (h(0.0) - h(1.0))
        assert h(root) == pytest.approx(0.0, abs=1e-12)
        return root


def test_aggregation_solves_the_counter_example_that_unrolling_does_not():
    """y₁ goes to x at any rate, y₂ stays at 0 under G: F is then ½ x² + ½ (x − 1)², least at ½."""
    example = TwoMinima()
    for steps in (40, 80):
        unrolled = Unroll(along=Gradient(steps=steps, optimizer=SGD(lr=0.5)))
        assert example.lowest(unrolled) == pytest.approx(0.5, abs=1e-9)
    off = [
        1 - example.lowest(Aggregation(steps=K, alpha=1.0, upper_lr=0.9, lower_lr=0.9))
        for K in (20, 40, 80, 160)
    ]
    # ½ (x − y₂)² is left with (1 − y₂ / x)², and y₂ / x = 1 − Π (1 − 0.9 / k) = 1 − O(K^-0.9)
    assert math.log2(off[2] / off[3]) == pytest.approx(2 * 0.9, abs=0.05)
    assert 0 < off[3] < 2e-6
