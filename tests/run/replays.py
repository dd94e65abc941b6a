"""Runs taken by themselves and from records, which must be the same."""

import itertools
from dataclasses import replace

import torch

from bilevel import rng
from bilevel.estimators import Alternating, Implicit, OneStep, Penalty, Unroll
from bilevel.events import Stepped, Traced, Warned
from bilevel.linear.cg import CG
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD, Adam, Clip, Schedule
from bilevel.run.engine import run, start
from bilevel.run.sameness import is_same
from bilevel.run.upper import Upper
from bilevel_problems.logistic import Logistic
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.simulated_quadratic import SimulatedQuadratic
from tests.run.setups import same, setup

FIXED = CG(iterations=3, tolerance=0.0)
LOGISTIC = Logistic(data="synthetic", num_features=6)
BLOCKS = SimulatedQuadratic(
    num_upper=2, num_lower=3, upper_samples=4, lower_samples=12, batch_size=2
)


class Parts:
    """Two entries a level: w of shape (2, 3) and a bias; G has a branch on a sum of x if it is `torn`."""

    torn = False

    def __init__(self):
        self.rows = torch.randn(8, 3, dtype=torch.float64, generator=rng.stream(0, "rows"))
        self.aim = torch.ones(8, 2, dtype=torch.float64)

    def init(self, streams):
        zeros = torch.zeros(2, 3, dtype=torch.float64)
        return {"w": zeros - 1, "b": zeros[:, 0] + 0.02}, {
            "w": zeros.clone(),
            "b": zeros[:, 0].clone(),
        }

    def upper_loss(self, x, y, batch):
        return (self.rows @ y["w"].T + y["b"] - self.aim).square().mean()

    def lower_loss(self, x, y, batch):
        w = 1.0 if self.torn and x["b"].sum() > 0 else 2.0
        return self.upper_loss(x, y, batch) + w * sum(
            (x[name].exp() * y[name].square()).sum() for name in y
        )

    def upper_batches(self, generator):
        return itertools.repeat(None)

    lower_batches = upper_batches


class OneLevel(Parts):
    """No x: y alone is fitted, and F watched."""

    def init(self, streams):
        return {}, super().init(streams)[1]

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + sum(entry.square().sum() for entry in y.values())


SETUPS = {
    "cg": setup(LOGISTIC, Implicit(solver=FIXED)),
    "neumann": setup(LOGISTIC, Implicit(solver=Neumann(iterations=4, scale=0.3))),
    "gradients": setup(Quadratic(), Implicit(solver=FIXED, damping=0.1)),
    "unroll": setup(LOGISTIC, Unroll()),
    "recompute": setup(LOGISTIC, Unroll(memory="recompute", last=3)),
    "one_step": setup(LOGISTIC, OneStep()),
    "differences": setup(LOGISTIC, OneStep(finite_difference=True)),
    "penalty": setup(LOGISTIC, Penalty(lower=Gradient(steps=3, optimizer=SGD(lr=0.1)))),
    "several entries": setup(Parts(), Implicit(solver=FIXED), optimizer=SGD(lr=0.1, momentum=0.9)),
    "adam below": setup(LOGISTIC, Unroll(), lower=Gradient(steps=3, optimizer=Adam(lr=0.1))),
    "one level": setup(OneLevel(), Alternating()),
    "float32": setup(LOGISTIC, Implicit(solver=FIXED), dtype=torch.float32),
    "clip and schedule": replace(
        setup(
            LOGISTIC,
            Implicit(solver=FIXED),
            lower=Gradient(steps=3, optimizer=SGD(lr=0.3), clip=Clip(norm=0.05)),
        ),
        upper=Upper(steps=6, schedule=Schedule(name="ExponentialLR", options={"gamma": 0.5})),
    ),
}


def ended(s, state=None):
    """(state, steps, what was recorded, why steps were taken by themselves) of a run."""
    state = state or start(s)
    events = list(run(s, state))
    found = [[e for e in events if isinstance(e, kind)] for kind in (Stepped, Traced, Warned)]
    return state, *found[:2], [e.message for e in found[2] if e.kind == "compile"]


def require_same(one, other):
    for name in ("x", "y", "lower", "upper", "estimator", "totals", "warned"):
        assert same(getattr(one[0], name), getattr(other[0], name)), name
    assert len(one[1]) == len(other[1])
    for a, b in zip(one[1], other[1], strict=True):
        assert is_same(replace(a, seconds=0.0), replace(b, seconds=0.0))


def both(s, traces=1):
    """A run as it is and one from records, which must be the same."""
    plain, compiled = ended(s), ended(replace(s, compile="step"))
    require_same(plain, compiled)
    assert compiled[3] == []
    assert len(compiled[2]) == traces
    return compiled
