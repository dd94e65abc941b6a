"""What Python remembers beside the tensors of a replayed step: it is looked at, or compared with the step."""

import gc
import itertools
import weakref
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators import Implicit, Unroll
from bilevel.events import Stepped
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD
from bilevel.problem.learned_start import LearnedStart
from bilevel.run import replayed
from bilevel.run.engine import restore, run, start
from bilevel.run.minimize import iterate, minimize
from bilevel.run.targets import EarlyStop
from tests.run.replays import FIXED, Parts, ended, require_same
from tests.run.setups import frozen, setup


class Remembering(Parts):
    """G's weight is what `weight` says, which changes after step `change`."""

    def __init__(self, change):
        super().__init__()
        self.change, self.drawn, self.box = change, 0, [0.0]

    def lower_loss(self, x, y, batch):
        return super().lower_loss(x, y, batch) * (1 + self.weight() / 10)

    def project_upper(self, x):
        """Called once a step, at its end."""
        self.box[1:] = [*self.box[1:], None]
        if len(self.box) > self.change:
            self.remember()
        return x


class ByAttribute(Remembering):
    def remember(self):
        self.drawn = 1.0

    def weight(self):
        return self.drawn


class ByEntry(Remembering):
    """In a list, where only a comparison finds it."""

    def remember(self):
        self.box[0] = 1.0

    def weight(self):
        return self.box[0]


def test_an_attribute_that_changes_is_seen_at_once():
    plain = ended(setup(ByAttribute(4), Implicit(solver=FIXED)))
    compiled = ended(replace(setup(ByAttribute(4), Implicit(solver=FIXED)), compile="step"))
    require_same(plain, compiled)
    assert [(trace.step, trace.why) for trace in compiled[2]][1:] == [
        (5, "the problem's drawn has changed")
    ]


class ByNestedEntry(Remembering):
    """In a dict of an attribute, of a problem within another one, with a cached property."""

    def __init__(self, change):
        super().__init__(change)
        self.part = SimpleNamespace(options={"weight": 0.0})

    def remember(self):
        self.part.options["weight"] = 1.0

    @cached_property
    def one(self):
        return 1.0

    def weight(self):
        return self.one * self.part.options["weight"]


def test_an_entry_of_a_problem_within_another_one_is_seen_at_once():
    def made(mode):
        problem = LearnedStart(problem=ByNestedEntry(4))
        return replace(setup(problem, Unroll()), compile=mode)

    compiled = ended(made("step"))
    require_same(ended(made("off")), compiled)
    changes = [(trace.step, trace.why) for trace in compiled[2]][1:]
    assert changes == [(5, "the problem's weight has changed")]


def test_a_property_that_is_cached_as_a_step_is_recorded_is_no_change():
    """So it is in the first step of a run that is resumed."""
    s = replace(setup(ByNestedEntry(99), Implicit(solver=FIXED), steps=6), compile="step")
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 2:
            break
    other = replace(s, problem=ByNestedEntry(99))
    compiled = ended(other, restore(other, frozen(state.save())))
    assert not compiled[3]
    assert len(compiled[2]) == 1


def test_what_changes_before_the_first_replay_is_taken_without():
    plain = ended(setup(ByEntry(2), Implicit(solver=FIXED)))
    compiled = ended(replace(setup(ByEntry(2), Implicit(solver=FIXED)), compile="step"))
    compiled[0].warned.pop("compile")
    require_same(plain, compiled)
    assert len(compiled[3]) == 1
    assert "what Python remembers" in compiled[3][0]


def test_what_changes_later_ends_the_run(monkeypatch):
    monkeypatch.setattr(replayed, "EVERY", 4)
    s = replace(setup(ByEntry(4), Implicit(solver=FIXED), steps=20), compile="step")
    state = start(s)
    with pytest.raises(ProblemError, match=r"step 7: .* Up to 3 steps before it may be others too"):
        list(run(s, state))
    assert state.step == 6
    # at the end of a run too, where no comparison is due yet
    monkeypatch.setattr(replayed, "EVERY", 50)
    last = replace(setup(ByEntry(6), Implicit(solver=FIXED), steps=10), compile="step")
    with pytest.raises(
        ProblemError, match=r"step 10: .* Up to 6 steps before it may be others too"
    ):
        list(run(last, start(last)))
    # control: where nothing changes nothing is found
    assert (
        ended(replace(setup(ByEntry(99), Implicit(solver=FIXED), steps=20), compile="step"))[3]
        == []
    )


class Resting(ByEntry):
    """With a measure that gains nothing."""

    def evaluate(self, x, y):
        return {"still": 0.0}


STOP = EarlyStop(measure="still", mode="min", patience=3)


@pytest.mark.parametrize("change", [6, 99])
def test_a_run_that_stops_early_is_compared_at_its_last_step(change):
    s = setup(Resting(change), Implicit(solver=FIXED), steps=200)
    s = replace(s, compile="step", stop=STOP, evaluate_every=4)
    state = start(s)
    if change == 99:  # control
        assert list(run(s, state))[-1].reason == "stopped early"
    else:
        with pytest.raises(ProblemError, match=r"step 12: .* Up to 8 steps before it may be"):
            list(run(s, state))
    assert state.step == 12


@pytest.mark.parametrize("change", [6, 99])
def test_what_is_saved_is_compared_first(change):
    """Wherever a run ends for now, by a signal or an error: what is resumed from is a step's own."""
    s = replace(setup(ByEntry(change), Implicit(solver=FIXED), steps=40), compile="step")
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 9:
            break
    if change == 99:  # control
        assert state.save()["step"] == 9
    else:
        with pytest.raises(ProblemError, match=r"step 9: .* Up to 5 steps before it may be others"):
            state.save()


def test_a_run_that_is_interrupted_is_compared():
    class Interrupted(ByEntry):
        def project_upper(self, x):
            if len(self.box) == 9:
                raise KeyboardInterrupt
            return super().project_upper(x)

    def interrupted(change):
        return minimize(
            Interrupted(change),
            estimator=Unroll(),
            steps=40,
            compile="step",
            lower=Gradient(steps=5, optimizer=SGD(lr=0.05)),
            dtype="float64",
            progress=False,
        )

    with pytest.raises(ProblemError, match=r"step 9: .* Up to 5 steps before it may be others"):
        interrupted(6)
    with pytest.warns(UserWarning, match="interrupted after 8 of 40"):  # control
        assert interrupted(99).reason == "interrupted"


class TwoShapes(ByEntry):
    """Batches of another shape from step `later` on."""

    later = 9

    def upper_batches(self, generator):
        for step in itertools.count():
            yield torch.ones(1 if step < self.later else 2)

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, None) * (1.0 if batch is None else batch.mean())

    def lower_loss(self, x, y, batch):
        return Parts.upper_loss(self, x, y, None) * (1 + self.weight() / 10) + sum(
            (x[name].exp() * y[name].square()).sum() for name in y
        )


@pytest.mark.parametrize("change", [6, 99])
def test_a_record_that_is_left_for_another_is_compared_too(change):
    """The second one is made after the change, and says nothing of the steps of the first."""
    s = replace(setup(TwoShapes(change), Implicit(solver=FIXED), steps=20), compile="step")
    if change == 99:  # control
        assert len(ended(s)[2]) == 2
    else:
        with pytest.raises(ProblemError, match=r"step 9: .* Up to 5 steps before it may be others"):
            list(run(s, start(s)))


def test_what_is_over_holds_no_record():
    scene = setup(estimator=Implicit(solver=FIXED), compile="step", steps=8)
    state = start(scene)
    records = []
    for event in run(scene, state):
        if isinstance(event, Stepped) and (owner := getattr(state.settle, "__self__", None)):
            records.append(weakref.ref(owner))
            del owner
    gc.collect()
    assert records
    assert not [record for record in records if record() is not None]


def test_an_iteration_that_is_left_is_compared_where_that_is_asked_for():
    def left(change):
        iteration = iterate(
            ByEntry(change),
            estimator=Unroll(),
            steps=40,
            compile="step",
            lower=Gradient(steps=5, optimizer=SGD(lr=0.05)),
            dtype="float64",
        )
        steps = (event for event in iteration if isinstance(event, Stepped))
        list(itertools.islice(steps, 12))
        assert iteration.state is not None
        return iteration.state

    left(99).settle()  # negative control
    with pytest.raises(ProblemError, match=r"runtime\.compile: step 12: from its record it comes"):
        left(6).settle()
