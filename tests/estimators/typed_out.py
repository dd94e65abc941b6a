"""A problem whose losses, gradients and second derivatives are typed out, and what to do with it."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.calculus.finite_differences import central
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import LowerSolution, Point
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close, closed_form, offset

LR = 0.05
STEP = SGD(lr=LR)


class Typed:
    """The derivatives of the quadratic problem, written down."""

    def __init__(self, case):
        self.k, self.x, self.rho = case.problem.constants, case.x["x"], case.problem.rho

    def F(self, y):
        k, x = self.k, self.x
        return 0.5 * (y - k["t"]).square().sum() + (
            0.5 * self.rho * (x - k["s"]).square().sum() + y @ k["D"] @ x
        )

    def G(self, y):
        return 0.5 * y @ self.k["A"] @ y - y @ (self.k["B"] @ self.x + self.k["c"])

    def F_x(self, y):
        return self.rho * (self.x - self.k["s"]) + self.k["D"].T @ y

    def F_y(self, y):
        return y - self.k["t"] + self.k["D"] @ self.x

    def G_x(self, y):
        return -self.k["B"].T @ y

    def G_y(self, y):
        return self.k["A"] @ y - self.k["B"] @ self.x - self.k["c"]


def descend(y, gradient, steps, lr):
    for _ in range(steps):
        y = y - lr * gradient(y)
    return y


def assert_moves(got, h, y, along):
    """Both directions, to rounding."""
    assert_close(got.hypergradient, {"x": h}, rtol=1e-12)
    assert_close(got.moved.y, {"y": y - LR * along}, rtol=1e-13)
    assert_close({"y": (y - got.moved.y["y"]) / LR}, {"y": along}, rtol=1e-11)
    assert got.moved.gradient_norm == pytest.approx(float(along.norm()), rel=1e-12)


def against_differences(estimator, objective_of, make):
    """(relative error against differences of the claimed function, error of the differences)"""
    case = closed_form(make, 0)
    y = offset(case.y, 0.7)
    path = case.record(3, 0.1, y).path if estimator.needs.path else None
    tight = estimator.tight(tree.size(y)) if hasattr(estimator, "tight") else estimator
    got = case.estimate(tight, LowerSolution(y, path=path))
    other = objective_of(tight).objective(case.losses(), Point(case.x, y, path))
    found = central(other, case.x, stream(0, "differences"))
    assert float(found.slopes.norm()) > 0
    error = float((found.along(got.hypergradient) - found.slopes).norm() / found.slopes.norm())
    return error, found.error


def resting(estimator, case):
    """(x, y) at which neither moves: both directions are affine on a quadratic, so one solve."""
    n, m = tree.size(case.x), tree.size(case.y)

    def directions(point):
        at = replace(case, x={"x": point[:n]}, y={"y": point[n:]})
        got = at.estimate(estimator)
        return torch.cat([got.hypergradient["x"], (point[n:] - got.moved.y["y"]) / LR])

    origin = directions(torch.zeros(n + m, dtype=torch.float64))
    columns = [directions(e) - origin for e in torch.eye(n + m, dtype=torch.float64)]
    point = torch.linalg.solve(torch.stack(columns, 1), -origin)
    assert float(directions(point).norm()) <= 1e-6 * float(origin.norm()), "not affine"
    return {"x": point[:n]}, {"y": point[n:]}


def solution(problem):
    """x* with ∇Φ(x*) = 0, which is affine in x on a quadratic."""
    n = problem.num_upper
    origin = problem.hypergradient({"x": torch.zeros(n, dtype=torch.float64)})["x"]
    columns = [
        problem.hypergradient({"x": e})["x"] - origin for e in torch.eye(n, dtype=torch.float64)
    ]
    return {"x": torch.linalg.solve(torch.stack(columns, 1), -origin)}


def run(estimator, steps, lr, problem=None):
    made = Setup(
        problem=problem or Quadratic(),
        lower=Gradient(steps=1),
        upper=Upper(steps=steps, optimizer=SGD(lr=lr)),
        estimator=estimator,
        dtype=torch.float64,
    )
    state = engine.start(made)
    for _ in engine.run(made, state):
        pass
    return made.problem, state


def steps(count, lr):
    return Gradient(steps=count, optimizer=SGD(lr=lr))
