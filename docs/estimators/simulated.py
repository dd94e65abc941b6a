"""The set-up in which the page of the stochastic methods measures: a run counted in oracle calls."""

from __future__ import annotations

import torch

from bilevel.events import Evaluated, Stepped
from bilevel.lower import Gradient
from bilevel.optimizers import SGD
from bilevel.registry.build import build
from bilevel.run import Setup, Upper
from bilevel.run.engine import evaluate, run, start
from bilevel.types import Estimator
from bilevel_problems.simulated_quadratic import SimulatedQuadratic

problem = SimulatedQuadratic(batch_size=256)  # 16 blocks of G, 2 of F


def method(name: str) -> Estimator:
    """A preset at the step size that all methods share here."""
    options = {"lower_lr": 0.3, "adjoint_lr": 0.3}
    return build("estimators", {"name": name, **options})


def curve(estimator: Estimator, budgets: tuple[int, ...], seed: int = 0) -> list[float]:
    """‖∇Φ‖² once gradients, HVPs and cross products on a batch add up to each of the budgets."""
    upper = Upper(steps=10**6, optimizer=SGD(lr=0.4))
    setup = Setup(problem, Gradient(), upper, estimator, dtype=torch.float64, seed=seed)
    state, found = start(setup), []
    for event in run(setup, state):
        if not isinstance(event, Stepped):
            continue
        spent = event.totals.gradients + event.totals.hvps + event.totals.cross_products
        while len(found) < len(budgets) and spent >= budgets[len(found)]:
            (measured,) = (e for e in evaluate(setup, state) if isinstance(e, Evaluated))
            found.append(float(measured.metrics["squared hypergradient norm"]))  # pyright: ignore[reportArgumentType]
        if len(found) == len(budgets):
            return found
    return found
