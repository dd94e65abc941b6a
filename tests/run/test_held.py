"""The control of a run: x as it began, y trained as long."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel.estimators.bome import Bome
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.rising_penalty import RisingPenalty
from bilevel.estimators.single_loop import SingleLoop
from bilevel.estimators.unroll import Unroll
from bilevel.events import HELD, Evaluated, Held, Progress, Tabulated, Warned
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper


class Follow:
    """G = (y − x)²/2 from y = 0, F = (y − 3)²/2, x = 1 at first; measures are x and y themselves."""

    x, lr = 1.0, 0.5

    def init(self, streams):
        return {"x": torch.tensor(self.x)}, {"y": torch.tensor(0.0)}

    def upper_loss(self, x, y, batch):
        return 0.5 * (y["y"] - 3).square()

    def lower_loss(self, x, y, batch):
        return 0.5 * (y["y"] - x["x"]).square()

    def upper_batches(self, stream):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def evaluate(self, x, y):
        return {"x": float(x["x"]), "y": float(y["y"])}


class Slow(Follow):
    """Measures in stages, with a table and a warning."""

    def evaluate(self, x, y):
        yield Progress("measuring", 0)
        yield Tabulated(-1, "rows", [{"y": float(y["y"])}])
        yield Warned(-1, "odd", "said")
        return super().evaluate(x, y)


class Restarting(Follow):
    def lower_start(self, x, y):
        return {"y": x["x"] - 8}


class Noisy(Restarting):
    """Each lower step pulls y to a point of its own."""

    def lower_loss(self, x, y, batch):
        return 0.5 * (y["y"] - x["x"] - batch).square()

    def lower_batches(self, stream):
        while True:
            yield torch.randn((), generator=stream)


class InEpisodes(Noisy):
    def episodes(self, stream):
        return ((batch, None) for batch in self.lower_batches(stream))


class Still(SGD):
    """An optimizer that leaves x where it is."""

    def step(self, params, gradient, state):
        return params, state


class Leap(SGD):
    """x is 2 from the first step on."""

    def step(self, params, gradient, state):
        return {"x": torch.full_like(params["x"], 2.0)}, state


def setup(problem=None, estimator=None, steps=4, lr=0.5):
    return Setup(
        problem=problem or Follow(),
        lower=Gradient(steps=2, optimizer=SGD(lr=lr)),
        upper=Upper(steps=steps, optimizer=SGD(lr=0.3)),
        estimator=estimator or Implicit(),
        dtype=torch.float64,
        evaluate_held=True,
    )


def events(made, kind=Held):
    found = list(engine.run(made, engine.start(made)))
    return [event for event in found if isinstance(event, kind)]


def test_y_is_trained_as_long_as_in_the_run_and_x_is_as_it_began():
    found = events(setup(), (Evaluated, Held))
    before, after, held = found
    assert before.metrics == {"x": 1.0, "y": 0.0}
    # two steps that halve the distance, four times
    assert held.metrics == {"x": 1.0, "y": 1 - 0.5**8}
    assert min(after.metrics.values()) > 1.5
    assert (type(held), held.step) == (Held, 4)


@pytest.mark.parametrize(
    "estimator",
    [Implicit(), Unroll(), FixedPoint(), Bome(), SingleLoop(lower_lr=0.2, adjoint_lr=0.2)],
    ids=lambda e: type(e).__name__,
)
def test_it_is_a_run_whose_x_stands_still(estimator):
    made = setup(estimator=estimator)
    still = replace(made, upper=Upper(steps=4, optimizer=Still()))
    (held,) = events(made)
    *_, end = events(still, Evaluated)
    assert held.metrics == end.metrics
    assert end.metrics["y"] != 0


@pytest.mark.parametrize("problem", [Noisy(), InEpisodes()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_solves_that_begin_at_one_start_are_taken_each_on_its_own_batches(problem, accumulate):
    made = setup(problem)
    made = replace(made, upper=replace(made.upper, accumulate=accumulate))
    still = replace(made, upper=replace(made.upper, optimizer=Still()))
    (held,) = events(made)
    *_, end = events(still, Evaluated)
    assert held.metrics == end.metrics
    (first,) = events(setup(problem, steps=1))  # control: one solve is not as good
    assert held.metrics != first.metrics


def test_a_method_that_moves_y_goes_on_with_its_state_from_one_start_on_one_batch():
    """The strength of its penalty rises from step to step, and with it where y ends."""
    made = setup(Restarting(), estimator=RisingPenalty())
    (held,) = events(made)
    *_, end = events(replace(made, upper=Upper(steps=4, optimizer=Still())), Evaluated)
    (first,) = events(setup(Restarting(), estimator=RisingPenalty(), steps=1))
    assert held.metrics == end.metrics != first.metrics


def test_the_run_is_the_same_with_it_and_without():
    made = setup()
    ends = []
    for asked in (True, False):
        chosen = replace(made, evaluate_held=asked)
        state = engine.start(chosen)
        told = list(engine.run(chosen, state))
        assert any(isinstance(event, Held) for event in told) is asked
        ends.append((state.x["x"], state.y["y"], state.totals))
    assert ends[0] == ends[1]


def test_a_solve_that_begins_anew_each_time_on_one_batch_is_taken_once():
    found = events(setup(Restarting()), (Held, Progress))
    solves = [e for e in found if isinstance(e, Progress) and e.stage == HELD]
    assert [event.done for event in solves] == [0, 4]
    (held,) = (event for event in found if isinstance(event, Held))
    assert held.metrics == {"x": 1.0, "y": 1 - 8 * 0.5**2}


def test_its_tables_and_warnings_are_not_those_of_the_run():
    found = events(setup(Slow()), (Held, Tabulated, Warned))
    assert [type(event).__name__ for event in found].count("Tabulated") == 2
    assert [type(event).__name__ for event in found].count("Warned") == 2
    assert sum(isinstance(event, Held) for event in found) == 1


def test_a_control_that_diverges_is_said_and_the_run_is_done():
    """At the first x the lower steps are too long, and the run leaves it after one solve."""

    class Overflowing(Follow):
        def lower_loss(self, x, y, batch):
            return 0.5 * (1 + 200 * (x["x"] - 1).abs().lt(0.5)) * (y["y"] - x["x"]).square()

    made = setup(Overflowing(), estimator=Unroll(), steps=200)
    made = replace(made, upper=Upper(steps=200, optimizer=Leap()))
    found = events(made, (Held, Warned, engine.Finished))
    assert not any(isinstance(event, Held) for event in found)
    (warned,) = (e for e in found if isinstance(e, Warned) and e.kind == HELD)
    assert "with x as it began, lower solve" in warned.message
    assert found[-1].reason == "done"


@pytest.mark.parametrize("lacks", ["x", "evaluate"])
def test_nothing_is_measured_where_there_is_nothing_to_hold_or_to_measure(lacks):
    class Bare(Follow):
        def init(self, streams):
            x, y = super().init(streams)
            return ({} if lacks == "x" else x), y

        def lower_loss(self, x, y, batch):
            return super().lower_loss(x or {"x": 1.0}, y, batch)

        def evaluate(self, x, y):
            return {"y": float(y["y"])}

    if lacks == "evaluate":
        Bare.evaluate = None
    assert not events(setup(Bare()))


def test_minimize_gives_it_when_asked():
    options = {"lower": Gradient(steps=2, optimizer=SGD(lr=0.5)), "steps": 4, "dtype": "float64"}
    asked = bilevel.minimize(Follow(), **options, evaluate_held=True)
    assert asked.held == {"x": 1.0, "y": 1 - 0.5**8}
    assert asked.metrics["x"] != 1.0
    assert bilevel.minimize(Follow(), **options).held == {}


def test_nested_variables_are_held_too():
    class Nested(Follow):
        def init(self, streams):
            return {"in": {"x": torch.tensor(1.0)}}, {"y": torch.tensor(0.0)}

        def lower_loss(self, x, y, batch):
            return super().lower_loss(x["in"], y, batch)

        def evaluate(self, x, y):
            return super().evaluate(x["in"], y)

    (held,) = events(setup(Nested()))
    assert held.metrics == {"x": 1.0, "y": 1 - 0.5**8}
    assert math.isfinite(held.seconds)
