"""Batches of steps that are replayed: what iterators may do, and what they may not."""

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators import Implicit, Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD
from bilevel.problem.unwritten import LOOKED_AT
from bilevel.rng import stream
from bilevel.run import engine, replayed
from bilevel.run.engine import run, start
from bilevel.run.upper import Upper
from tests.run.replays import FIXED, ended, require_same
from tests.run.setups import Noisy, setup

LOWER = Gradient(steps=3, optimizer=SGD(lr=0.1))
VARYING = Gradient(steps=6, optimizer=SGD(lr=0.2), tolerance=0.6)


class Drawn(Noisy):
    """Lower batches as `make` gives them."""

    def __init__(self, make):
        self.make = make

    def lower_batches(self, generator):
        return self.make(generator)


def rows(generator):
    return torch.randn(5, 3, dtype=torch.float64, generator=generator)


def require_given_up(s, reason, other=None):
    """That replays of a run say why there are none, and that it is the run without."""
    plain, compiled = ended(s), ended(replace(other or s, compile="step"))
    assert reason in compiled[3][0]
    compiled[0].warned.pop("compile")
    require_same(plain, compiled)


class Restarting:
    """Ends after `count` batches, and then begins again where it is asked once more."""

    def __init__(self, count, generator):
        self.count, self.at, self.generator = count, 0, generator

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.count:
            self.at = 0
            raise StopIteration
        self.at += 1
        return rows(self.generator)


@pytest.mark.parametrize("count", [5, 7, 9, 14])
def test_an_iterator_that_ends_ends_the_run_where_it_does_without(count):
    ends = []
    for compile in ("off", "step"):
        problem = Drawn(lambda generator: Restarting(count, generator))
        s = replace(setup(problem, Unroll(), steps=9, lower=LOWER), compile=compile)
        state = start(s)
        with pytest.raises(ProblemError) as told:
            list(run(s, state))
        ends.append((str(told.value), state.step))
    assert ends[0] == ends[1]
    assert f"ended after {count} batches" in ends[0][0]


def one_buffer(generator):
    """From where on a run no longer looks whether batches are written into."""
    yield from (rows(generator) for _ in range(LOOKED_AT))
    buffer = torch.zeros(5, 3, dtype=torch.float64)
    while True:
        yield buffer.copy_(rows(generator))


def test_batches_in_one_buffer_are_seen():
    s = setup(Drawn(one_buffer), Implicit(solver=FIXED), steps=9, lower=LOWER)
    require_given_up(s, "batches of a step share memory")
    # control: one batch for all steps is as well the same memory, and is replayed
    batch = rows(stream(0, "batch"))
    s = setup(Drawn(lambda _: itertools.repeat(batch)), Unroll(), steps=9, lower=LOWER)
    assert ended(replace(s, compile="step"))[3] == []


class Counting(Noisy):
    """Drawing a lower batch says how many were drawn before, which G reads."""

    def __init__(self, at):
        self.at, self.weight = at, 1.0

    def lower_loss(self, x, y, batch):
        return self.weight * super().lower_loss(x, y, batch)

    def lower_batches(self, generator):
        for k in itertools.count():
            if self.at(k):
                self.weight = 1.0 + k / 100
            yield rows(generator)


def test_drawing_may_not_change_what_a_loss_reads():
    s, other = (setup(Counting(bool), Unroll(memory="store"), steps=9, lower=LOWER) for _ in "ab")
    require_given_up(s, "the problem's weight changes within a step", other)


def test_drawing_that_changes_it_seldom_ends_the_run_before_a_step_is_wrong():
    s = setup(Counting(lambda k: k == 16), Unroll(), steps=9, lower=LOWER)
    s = replace(s, compile="step")
    state = start(s)
    with pytest.raises(ProblemError, match="weight changed as the batches of a step were drawn"):
        list(run(s, state))
    assert state.step == 5
    state.rewind()
    plain = setup(Counting(lambda k: k == 16), Unroll(), steps=9, lower=LOWER)
    again = engine.restore(plain, state.save())
    list(run(plain, again))
    whole = setup(Counting(lambda k: k == 16), Unroll(), steps=9, lower=LOWER)
    assert torch.equal(again.x["log_penalty"], ended(whole)[0].x["log_penalty"])


class Shared(Noisy):
    """Both levels draw from one stream, so that the order of draws between them counts."""

    def __init__(self):
        self.seeds = itertools.count()

    def upper_batches(self, generator):
        for seed in self.seeds:
            yield rows(stream(seed, "rows"))

    lower_batches = upper_batches


def test_compiled_steps_draw_in_the_order_of_the_step(monkeypatch):
    """Solves of varying length: what is drawn ahead of a decision would be another level's."""
    monkeypatch.setattr(replayed, "PAYS", 0)
    monkeypatch.setattr(engine, "by_inductor", lambda region, _: lambda args: list(region(*args)))
    s, other = (setup(Shared(), Implicit(solver=FIXED), steps=30, lower=VARYING) for _ in "ab")
    plain, compiled = ended(s), ended(replace(other, compile="inductor"))
    assert len({step.lower.steps for step in plain[1]}) > 1
    assert compiled[0].lower_batches.drawn == plain[0].lower_batches.drawn
    assert compiled[0].x["log_penalty"].sub(plain[0].x["log_penalty"]).abs().max() < 1e-12


class Episodic(Noisy):
    def episodes(self, generator):
        while True:
            yield rows(generator), rows(generator)


def test_episodes_in_rounds_are_taken_as_with_off():
    s = setup(Episodic(), Implicit(solver=FIXED), steps=5, lower=LOWER)
    require_given_up(replace(s, upper=Upper(steps=5, accumulate=2)), "episodes")


class Multiplied(Noisy):
    def lower_loss(self, x, y, batch):
        return super().lower_loss(x, y, batch) + y["w"].exp().prod()


def test_a_product_over_entries_is_refused():
    s = setup(Multiplied(), Unroll(memory="store"), steps=6, lower=LOWER)
    require_given_up(s, "takes a product over entries")


class Single(Drawn):
    """A product in float32 within a run in float64."""

    def lower_loss(self, x, y, batch):
        found = batch.float() @ y["w"].float()[:, None]
        return super().lower_loss(x, y, batch) + 0.1 * found.double().square().mean()


def test_a_product_in_float32_may_be_summed_in_another_order(monkeypatch):
    monkeypatch.setattr(replayed, "PAYS", 0)

    def by(error):
        def compiler(region, _):
            return lambda args: [
                one * (1 + error) if one.is_floating_point() else one for one in region(*args)
            ]

        return compiler

    def endless(generator):
        while True:
            yield rows(generator)

    for problem, is_taken in ((Single(endless), True), (Drawn(endless), False)):
        monkeypatch.setattr(engine, "by_inductor", by(1e-7))
        s = setup(problem, Unroll(memory="store"), steps=9, lower=LOWER)
        state = ended(replace(s, compile="inductor"))[0]
        assert ("inductor" not in state.warned) == is_taken
