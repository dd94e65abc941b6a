"""A level that is where it began, though its gradient says otherwise, is warned of when the run is over."""

import itertools
from typing import Any

import pytest
import torch

from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.single_loop import SingleLoop
from bilevel.events import Finished, Warned
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.run.engine import restore, run, start
from tests.run.setups import Noisy, frozen, setup


class Steep:
    """F = ½‖y − 3‖², G = ½‖y − x‖², from x and y that are given."""

    def __init__(self, x=1.0, y=2.0):
        self.x, self.y = x, y

    def init(self, streams):
        return {"x": torch.full((5000,), self.x)}, {"y": torch.full((5000,), self.y)}

    def upper_loss(self, x, y, batch):
        return 0.5 * (y["y"] - 3).square().sum()

    def lower_loss(self, x, y, batch):
        return 0.5 * (y["y"] - x["x"]).square().sum()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches


def said(problem=None, lr=0.1, lower=0.1, **options):
    return ended(Gradient(steps=3, optimizer=SGD(lr=lower)), problem, lr, **options)


def ended(solver, problem=None, lr=0.1, **options):
    """What a run has warned of."""
    scene = setup(problem or Steep(), steps=4, lower=solver, optimizer=Adam(lr=lr), **options)
    events = list(run(scene, start(scene)))
    found = [event.message for event in events if isinstance(event, Warned)]
    assert isinstance(events[-1], Finished)
    assert ("unmoved" in events[-1].warned) == bool(found)
    return found


def test_levels_that_move_are_not_warned_of():
    assert said() == said(lr=1e-5, lower=1e-5) == said(Noisy(), lr=1e-3) == []
    assert said(Steep(x=0.0), lr=1e-4) == []
    assert said(estimator=SingleLoop()) == []


@pytest.mark.parametrize("begin", [1.0, 0.0, -1e5])
def test_an_upper_rate_that_moves_nothing(begin):
    (one,) = said(Steep(x=begin), lr=1e-9 * max(abs(begin), 1))
    assert one.startswith("x is where it began: after 4 steps no entry has changed by more than ")
    assert "upper.optimizer.lr" in one
    assert "y is" not in one


def test_a_lower_rate_that_moves_nothing():
    (one,) = said(lower=1e-9)
    assert one.startswith("y is where it began: after 4 steps")
    assert "lower.optimizer.lr" in one


def test_both_at_once_and_what_rounding_has_to_do_with_it():
    (one,) = said(lr=1e-4, lower=1e-5, dtype=torch.bfloat16, estimator=OneStep())
    assert "x is where it began" in one
    assert "y is where it began" in one
    assert "In torch.bfloat16 a step below 8e-03 of an entry is lost" in one


def test_a_level_that_rests_on_purpose_is_not_warned_of():
    at_solution = said(Steep(x=3.0, y=3.0))
    no_steps = ended(Gradient(steps=0))
    no_gradient = said(estimator=Alternating())  # F does not hold x
    solved = ended(LBFGS(), Steep(x=2.0))
    assert at_solution == no_steps == no_gradient == solved == []


def test_a_resumed_run_is_held_to_where_the_first_one_began():
    scene = setup(Steep(), steps=4, optimizer=Adam(lr=0.1))
    state = start(scene)
    saved: Any = None
    for _ in run(scene, state):
        saved = frozen(state.save()) if state.step == 3 else saved
    slow = setup(Steep(), steps=4, optimizer=Adam(lr=1e-9))
    events = list(run(slow, restore(slow, saved)))
    assert not [event for event in events if isinstance(event, Warned)]
    assert isinstance(events[-1], Finished)


def test_an_entry_among_many_is_enough():
    class Sparse(Steep):
        def upper_loss(self, x, y, batch):
            return 0.5 * (y["y"][1000:2000] - 3).square().sum()

    assert said(Sparse(), estimator=Implicit()) == []
