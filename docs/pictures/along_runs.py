"""Where runs are, against what they have spent: methods whose single answers are no hypergradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

import bilevel
from bilevel import hypergradient, tree
from bilevel.estimators import (
    MAID,
    Aggregation,
    Alternating,
    AveragedMultipliers,
    DynamicBarrier,
    Implicit,
    Joint,
    LancBiO,
    RisingPenalty,
    Unroll,
)
from bilevel.linear import CG
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.run import Setup, Upper
from bilevel.run.engine import run, start
from bilevel.types import Estimator, Params
from bilevel_problems.quadratic import Quadratic
from docs.estimators.measured import problem
from docs.estimators.simulated import curve, method
from docs.pictures.chart import Curves

Points = list[tuple[float, float]]


def _value(x: Params) -> float:
    return float(problem.upper_loss(x, problem.lower_solution(x), problem.constants))


def _least() -> float:
    """min Φ: dΦ/dx is affine in x."""
    unit = torch.cat([torch.zeros(1, 5), torch.eye(5)]).double()
    zero, *rows = (problem.hypergradient({"x": e})["x"] for e in unit)
    return _value({"x": torch.linalg.solve(torch.stack(rows, 1) - zero[:, None], -zero)})


def _trace(estimator: Estimator, lr: float, steps: int, lower: Gradient | None = None) -> Points:
    """Φ(x) less its minimum, as a share of that at the start, against all oracle calls."""
    upper = Upper(steps=steps, optimizer=SGD(lr=lr))
    setup = Setup(problem, lower or Gradient(), upper, estimator, dtype=torch.float64)
    state, least = start(setup), _least()
    first = _value(state.x) - least
    found: Points = []
    for event in run(setup, state):
        if isinstance(event, bilevel.events.Stepped):
            spent = state.totals
            calls = float(spent.gradients + spent.hvps + spent.cross_products)
            found.append((calls, max((_value(state.x) - least) / first, 1e-12)))
    return found


def adaptive(steps: int = 40) -> Curves:
    return {
        name: _trace(estimator, 1.0, steps)
        for name, estimator in (
            ("maid, ε from 0.1", MAID()),
            ("ε = 1e-3", MAID(accuracy=1e-3, accuracy_growth=1.0)),
            ("ε = 1e-6", MAID(accuracy=1e-6, accuracy_growth=1.0)),
        )
    }


def baselines(share: float = 1.0) -> Curves:
    """`share` of each run."""
    lower = Gradient(steps=20, optimizer=SGD(lr=1.0))
    return {
        "implicit": _trace(Implicit(), 0.01, int(share * 50), lower),
        "alternating": _trace(Alternating(), 0.01, int(share * 80), lower),
        "joint": _trace(Joint(optimizer=SGD(lr=0.1)), 0.01, int(share * 600), lower),
    }


def aggregation(counts: tuple[int, ...] = (5, 10, 20, 40, 80), steps: int = 800) -> Curves:
    """The counter-example of docs/estimators/aggregation.md."""

    def F(x: Params, y: Params, batch: None) -> torch.Tensor:
        return 0.5 * (x["x"] - y["y"][1]) ** 2 + 0.5 * (y["y"][0] - 1) ** 2

    def G(x: Params, y: Params, batch: None) -> torch.Tensor:
        return 0.5 * y["y"][0] ** 2 - x["x"] * y["y"][0]

    def settles(estimator: Estimator) -> tuple[float, float]:
        """Calls of one estimate, and |x − 1| where it is 0: it is affine in x."""
        y = {"y": torch.zeros(2, dtype=torch.float64)}
        at_0, at_1 = (
            hypergradient(F, G, {"x": x}, y, estimator=estimator)
            for x in torch.tensor([0.0, 1.0], dtype=torch.float64)
        )
        zero, one = (float(at.hypergradient["x"]) for at in (at_0, at_1))
        return _calls(at_0.stats), abs(zero / (zero - one) - 1)

    found: Curves = {
        "aggregation: K steps": [
            settles(Aggregation(steps=k, alpha=1.0, upper_lr=0.9, lower_lr=0.9)) for k in counts
        ],
        "unroll: K steps": [
            settles(Unroll(along=Gradient(steps=k, optimizer=SGD(lr=0.5)))) for k in counts
        ],
        "averaged_multipliers: a run": [],
    }
    x, y, state, spent = torch.tensor(0.0).double(), {"y": torch.zeros(2).double()}, None, 0.0
    for step in range(1, steps + 1):
        got = hypergradient(F, G, {"x": x}, y, estimator=AveragedMultipliers(), state=state)
        assert got.moved
        x, y, state = x - 0.1 * got.hypergradient["x"], got.moved.y, got.state
        spent += _calls(got.stats)
        if step in (25, 50, 100, 200, 400, 800):
            found["averaged_multipliers: a run"].append((spent, abs(float(x) - 1)))
    return found


def _calls(stats: Any) -> float:
    return float(stats.gradients + stats.hvps + stats.cross_products)


class NearestFit:
    """The problem of docs/estimators/simple_bilevel.md."""

    A = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 1.0]]).double()
    b, c = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 0.0, -1.0, 2.0]).double()
    best = c + torch.linalg.pinv(A) @ (b - A @ c)

    def init(self, streams: Any) -> tuple[Params, Params]:
        return {}, {"theta": torch.zeros(4)}

    def upper_loss(self, x: Params, y: Params, batch: None) -> torch.Tensor:
        return 0.5 * (y["theta"] - self.c).square().sum()

    def lower_loss(self, x: Params, y: Params, batch: None) -> torch.Tensor:
        return 0.5 * (self.A @ y["theta"] - self.b).square().sum()

    def upper_batches(self, stream: Any) -> Iterable[None]:
        return itertools.repeat(None)

    lower_batches = upper_batches


def simple_bilevel(marks: tuple[int, ...] = (3, 10, 30, 100, 300, 800)) -> Curves:
    found: Curves = {}
    for name, estimator in (
        ("dynamic_barrier, lr 0.1", DynamicBarrier(optimizer=SGD(lr=0.1))),
        ("dynamic_barrier, lr 0.025", DynamicBarrier(optimizer=SGD(lr=0.025))),
        ("rising_penalty, lr 0.2", RisingPenalty(optimizer=SGD(lr=0.2))),
    ):
        of = NearestFit()
        setup = Setup(of, Gradient(), Upper(steps=max(marks)), estimator, dtype=torch.float64)
        state, points = start(setup), []
        for event in run(setup, state):
            if isinstance(event, bilevel.events.Stepped) and event.step in marks:
                spent = state.totals.gradients
                points.append((float(spent), float((state.y["theta"] - of.best).norm())))
        found[name] = points
    return found


def stochastic(budgets: tuple[int, ...] = (100, 250, 500, 1000, 2000, 4000, 8000)) -> Curves:
    names = ("saba", "srba", "fsla", "soba", "stocbio")
    return {n: list(zip(budgets, curve(method(n), budgets), strict=True)) for n in names}


def lancbio(count: int = 6) -> Curves:
    """h along a path of x that moves by steps of 0.03, by the products of a step."""
    of = Quadratic(num_lower=40, condition=1000)
    found: Curves = {}
    for name, estimators in (
        ("lancbio, dimension 10, 5, 3", [LancBiO(dimension=d) for d in (10, 5, 3)]),
        ("cg, warm", [Implicit(solver=CG(iterations=k)) for k in (1, 2, 4, 8, 16)]),
        (
            "cg, cold",
            [Implicit(solver=CG(iterations=k), start="cold") for k in (1, 2, 4, 8, 16, 32)],
        ),
    ):
        found[name] = [_moving(of, estimator) for estimator in estimators[:count]]
    return found


def _moving(of: Quadratic, estimator: Estimator) -> tuple[float, float]:
    """(HVPs a step, median error of the last 12) over 24 steps of x."""
    direction = torch.linspace(-1, 1, of.num_upper, dtype=torch.float64)
    x, state, errors, hvps = torch.zeros(of.num_upper, dtype=torch.float64), None, [], 0
    for _ in range(24):
        x = x + 0.03 * direction
        got = hypergradient(
            of.upper_loss,
            of.lower_loss,
            {"x": x},
            of.lower_solution({"x": x}),
            estimator=estimator,
            upper_batch=of.constants,
            lower_batch=of.constants,
            state=state,
        )
        state, hvps = got.state, hvps + got.stats.hvps
        exact = of.hypergradient({"x": x})
        errors.append(tree.norm(tree.sub(got.hypergradient, exact)) / tree.norm(exact))
    return hvps / 24, sorted(errors[12:])[6]
