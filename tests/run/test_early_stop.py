"""Early stopping on a measure, the best state, and both under resume."""

import math
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel.errors import CheckpointError, RecipeError
from bilevel.events import Evaluated, Finished, Held, Stepped
from bilevel.lower import Gradient
from bilevel.optimizers import SGD, Clip
from bilevel.recipe import loads
from bilevel.recipe.assemble import assemble
from bilevel.run import Best, EarlyStop, Setup, Upper
from bilevel.run.early_stop import is_best
from bilevel.run.engine import restore, run, start
from tests.run.setups import Noisy, frozen, same, setup


class Told:
    """Its measure is what it is told, one after the other; F = y, G = (y − x)²/2."""

    def __init__(self, values):
        self.values = values

    def init(self, streams):
        return {"x": torch.zeros(())}, {"y": torch.zeros(())}

    def upper_loss(self, x, y, batch):
        return y["y"].square() + y["y"]

    def lower_loss(self, x, y, batch):
        return 0.5 * (y["y"] - x["x"]).square()

    def upper_batches(self, generator):
        while True:
            yield None

    lower_batches = upper_batches

    def evaluate(self, x, y):
        """Of the number of steps that were taken: each adds −1/4 of what is left to x = −1/2."""
        left = abs(float(x["x"]) + 0.5) / 0.5
        step = round(math.log(left) / math.log(0.5)) if left else len(self.values)
        return {"told": self.values[step] if step < len(self.values) else 0.0}


def told(values, stop=None, best=None, every=1, steps=12):
    return Setup(
        problem=Told(values),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
        upper=Upper(steps=steps, optimizer=SGD(lr=0.25)),
        estimator="implicit",
        evaluate_every=every,
        evaluate_held=True,
        stop=stop,
        best=best,
    )


def ended(s):
    state = start(s)
    return state, list(run(s, state))


def maximum(patience, min_delta=0.0, mode="max"):
    return EarlyStop(measure="told", mode=mode, patience=patience, min_delta=min_delta)


RISING = [0.0, 1.0, 2.0, 2.0, 1.5, 3.0, 2.9, 2.9, 2.9, 2.9, 2.9, 2.9, 2.9]
CASES = [
    (RISING, maximum(1), 3),  # the second 2 gains nothing
    (RISING, maximum(2), 4),
    (RISING, maximum(3), 8),
    (RISING, maximum(2, min_delta=1.0), 4),  # the 2 is more than 1 above the 0, the 1 is not
    ([-value for value in RISING], maximum(3, mode="min"), 8),
    (RISING, maximum(3, mode="min"), 3),  # 0 at the start is the least of all
    ([math.nan, math.nan, 1.0, 0.5, math.nan, 0.1], maximum(3), 5),  # NaN is no gain
    (RISING, maximum(20), 12),
]


@pytest.mark.parametrize(("values", "stop", "expected"), CASES)
def test_the_run_ends_where_the_measure_rests(values, stop, expected):
    state, events = ended(told(values, stop))
    assert state.step == expected
    assert [e.step for e in events if isinstance(e, Evaluated)] == [*range(expected + 1)]
    last = events[-1]
    assert isinstance(last, Finished)
    is_early = expected < 12
    assert last.reason == ("stopped early" if is_early else "done")
    if not is_early:
        assert last.message == ""
    (control,) = (event for event in events if isinstance(event, Held))
    assert control.step == expected


def test_it_says_why():
    _, events = ended(told(RISING, maximum(3)))
    assert events[-1].message == ("told has not risen above the 3 of step 5 in 3 evaluations")
    _, events = ended(told(RISING, maximum(2, 1.0, mode="min")))
    assert events[-1].message == (
        "told has not fallen below the 0 of step 0 by more than 1 in 2 evaluations"
    )


def test_patience_counts_evaluations_not_steps():
    state, _ = ended(told(RISING, maximum(2), every=2))  # at 0, 2, 4, 6, 8, 10: 0 2 1.5 2.9 2.9 2.9
    assert state.step == 10


def test_the_control_trains_y_as_long():
    """y after K solves with x held, not after all the steps that the run had."""

    class Slow(Noisy):
        def evaluate(self, x, y):
            return {"w": float(y["w"].sum()), "flat": 0.0}

    stop = EarlyStop(measure="flat", mode="max", patience=1)
    s = replace(setup(Slow(), steps=6), evaluate_every=2, evaluate_held=True, stop=stop)
    _, events = ended(s)
    (control,) = (event.metrics for event in events if isinstance(event, Held))
    short = replace(s, stop=None, upper=replace(s.upper, steps=2))
    (truth,) = (e.metrics for e in ended(short)[1] if isinstance(e, Held))
    (long,) = (e.metrics for e in ended(replace(s, stop=None))[1] if isinstance(e, Held))
    assert control == truth != long


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_resuming_is_exact(stop_at):
    """Interrupted at any evaluation, the run ends at the same step, and knows the same best."""
    s = told(RISING, maximum(3), Best(measure="told", mode="max"))
    whole, _ = ended(s)
    first = start(s)
    for event in run(s, first):
        if isinstance(event, Evaluated) and event.step == stop_at:
            break
    again = restore(s, frozen(first.save()))
    rest = list(run(s, again))
    assert same(again.save(), whole.save())
    assert rest[-1].reason == "stopped early"
    assert again.watched["checkpoint.best"] == {"value": 3.0, "step": 5, "waited": 3}
    # negative control: a run that has forgotten what it saw waits again
    saved = frozen(first.save())
    del saved["watched"]
    other = restore(s, saved)
    list(run(s, other))
    assert (other.step == 8) == (stop_at < 5)


def test_a_run_that_stopped_early_takes_no_step_when_it_is_resumed():
    s = told(RISING, maximum(3))
    state, events = ended(s)
    again = restore(s, frozen(state.save()))
    rest = list(run(s, again))
    assert not [event for event in rest if isinstance(event, Stepped)]
    assert (rest[-1].reason, rest[-1].message) == ("stopped early", events[-1].message)


@pytest.mark.parametrize("wrong", [1, {"a": 1}, {"a": {"value": 1.0, "step": -1, "waited": 0}}])
def test_what_was_watched_is_checked(wrong):
    s = told(RISING, maximum(3))
    saved = {**ended(s)[0].save(), "watched": wrong}
    with pytest.raises(CheckpointError, match="it was altered"):
        restore(s, saved)


@pytest.mark.parametrize("wrong", [1, {"row": "1"}, {"x": [1]}, {"x": {}}])
def test_what_a_policy_keeps_is_checked(wrong):
    s = told(RISING)
    saved = {**ended(s)[0].save(), "recovery": wrong}
    with pytest.raises(CheckpointError, match="it was altered"):
        restore(s, saved)


def test_which_state_is_the_best():
    s = told(RISING, best=Best(measure="told", mode="max"))
    state, found = start(s), []
    for event in run(s, state):
        if isinstance(event, Evaluated) and is_best(state):
            found.append(event.step)
    assert found == [0, 1, 2, 5]


def test_a_measure_that_is_not_there_is_told_at_the_first_evaluation():
    s = told(RISING, replace(maximum(1), measure="tolt"))
    with pytest.raises(RecipeError, match=r"evaluate.stop.measure = 'tolt'.*Did you mean 'told'"):
        ended(s)
    s = told(RISING, best=Best(measure="accuracy", mode="max"))
    with pytest.raises(RecipeError, match=r"checkpoint.best.measure.*Told.*Known: told"):
        ended(s)


def test_from_a_recipe():
    text = """
problem: quadratic
evaluate: {every: 5, stop: {measure: upper value, mode: min, patience: 3}}
checkpoint: {best: {measure: upper value, mode: min}}
"""
    recipe = loads(text)
    setup = assemble(recipe)
    assert setup.stop == EarlyStop(measure="upper value", mode="min", patience=3)
    assert setup.best == Best(measure="upper value", mode="min")
    assert loads(recipe.dump()) == recipe
    for override, message in (
        ("evaluate.every=0", "stop looks at the measures .* set every"),
        ("evaluate.stop.mode=up", "must be 'max' or 'min'"),
        ("evaluate.stop.patience=0", "evaluate.stop.patience = 0; must be > 0"),
        ("checkpoint.best=accuracy", "checkpoint.best = 'accuracy'"),
    ):
        with pytest.raises(RecipeError, match=message):
            loads(text, [override])


def test_from_python():
    result = bilevel.minimize(
        Told(RISING),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
        upper=SGD(lr=0.25),
        steps=12,
        evaluate_every=1,
        stop={"measure": "told", "mode": "max", "patience": 3},
        best={"measure": "told", "mode": "max"},
    )
    assert (result.reason, len(result.history)) == ("stopped early", 8)
    assert (result.best.step, result.best.metrics) == (5, {"told": 3.0})
    assert float(result.best.x["x"]) == pytest.approx(-0.5 * (1 - 0.5**5))
    assert float(result.x["x"]) == pytest.approx(-0.5 * (1 - 0.5**8))
    assert bilevel.minimize("quadratic", steps=1).best is None
    with pytest.raises(RecipeError, match="set evaluate_every"):
        bilevel.minimize("quadratic", stop={"measure": "a", "mode": "max", "patience": 3})
    with pytest.raises(RecipeError, match=r"stop.patience: missing"):
        bilevel.minimize("quadratic", evaluate_every=1, stop={"measure": "a", "mode": "max"})
    with pytest.raises(RecipeError, match=r"best = 'a'; must be a mapping"):
        bilevel.minimize("quadratic", best="a")


def test_the_upper_level_from_a_mapping():
    """As in a recipe; a mapping with a name is an optimizer."""
    options = {"optimizer": {"name": "sgd", "lr": 0.5}, "clip": {"norm": 1.0}, "accumulate": 2}
    got = bilevel.minimize("quadratic", upper=options, steps=2)
    clip = Upper(steps=2, optimizer=SGD(lr=0.5), clip=Clip(norm=1.0), accumulate=2)
    assert got.setup.upper == clip
    assert bilevel.minimize("quadratic", upper={"name": "sgd"}, steps=1).setup.upper.clip is None
    with pytest.raises(RecipeError, match=r"upper.clip: needs norm"):
        bilevel.minimize("quadratic", upper={"clip": {}})
