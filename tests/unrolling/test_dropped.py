"""A path that lacks steps is refused by whoever follows them all; the remedies give their values."""

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.errors import ProblemError
from bilevel.estimators import FOMAML, Forward, Reptile, Unroll, ZerothOrder
from bilevel.lower import Gradient
from bilevel.optimizers import SGD

X = {"s": torch.tensor(2.0, dtype=torch.float64)}
START = {"w": torch.zeros(1, dtype=torch.float64)}
STEPS, LR = 50, 0.1


def G(x, y, _):
    return ((y["w"] - x["s"]) ** 2).sum() / 2


def F(x, y, _):
    return y["w"].sum()


def solved(record):
    solver = Gradient(steps=STEPS, optimizer=SGD(lr=LR))
    return solve_lower(G, X, START, solver=solver, record=record)


def through(steps):
    """dy_K/ds of K steps y ← y − lr (y − s) after a start that is held fixed: 1 − (1 − lr)^K."""
    return 1 - (1 - LR) ** steps


def asked(estimator, record):
    return float(hypergradient(F, G, X, solved(record), estimator=estimator).hypergradient["s"])


@pytest.mark.parametrize(
    "estimator", [Unroll(), Unroll(last=20), Unroll(along=Gradient())], ids=repr
)
def test_unroll_refuses_a_path_that_is_shorter_than_what_it_follows(estimator):
    with pytest.raises(ProblemError, match=r"50 lower steps.*last 5 were.*record=True.*last=5"):
        asked(estimator, 5)


@pytest.mark.parametrize("estimator", [Forward(), ZerothOrder(), FOMAML(), Reptile()], ids=repr)
def test_whoever_follows_all_steps_refuses_as_unroll_does(estimator):
    with pytest.raises(ProblemError, match="all of the 50 lower steps, and only the last 5"):
        asked(estimator, 5)


def test_the_remedies_give_the_closed_form():
    assert asked(Unroll(), True) == pytest.approx(through(50), rel=1e-12)
    assert asked(Forward(), True) == pytest.approx(through(50), rel=1e-12)
    assert asked(Unroll(last=5), 5) == pytest.approx(through(5), rel=1e-12)
    assert asked(Unroll(last=20), 20) == pytest.approx(through(20), rel=1e-12)
    # more asked for than were taken is all of them
    assert asked(Unroll(last=80), True) == pytest.approx(through(50), rel=1e-12)
    assert asked(Unroll(last=80), 60) == pytest.approx(through(50), rel=1e-12)
    assert abs(through(5) - through(50)) > 0.5
