"""Proximal gradient steps: the closed form, and the first steps by hand."""

import math

import pytest
import torch

from bilevel import solve_lower
from bilevel.lower.proximal import Proximal
from bilevel.problem.levels import structure_of
from bilevel.rng import Streams
from bilevel_problems.box_qp import BoxQP
from bilevel_problems.lasso import Lasso
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close
from tests.estimators.maps import at_random


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
