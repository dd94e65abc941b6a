"""`runtime.compile: inductor` with a stand-in for the compiler: compared to rounding, or given up."""

import io
import itertools
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bilevel.errors import ProblemError
from bilevel.estimators import Unroll
from bilevel.events import COMPILED
from bilevel.lower.gradient import Gradient
from bilevel.optimizers import SGD
from bilevel.replay.program import Feed
from bilevel.run import engine, replayed, sameness
from bilevel.sinks.console import ConsoleReceiver
from bilevel_problems.logistic import Logistic
from tests.run.replays import ended, require_same
from tests.run.setups import setup

PLAIN = setup(Logistic(data="synthetic", num_features=6), Unroll(memory="store"), steps=9)
COMPILED_RUN = replace(PLAIN, compile="inductor")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A record is compiled at its first replay."""
    monkeypatch.setattr(replayed, "PAYS", 0)


def off_by(error, after=0):
    """A compiler of which results are off by a relative error, from some call on."""

    def compile(region, given):
        calls = iter(range(10**6))

        def call(args):
            size = 1 + (error if next(calls) > after else 0.0)
            return [one * size if one.is_floating_point() else one for one in region(*args)]

        return call

    return compile


def test_rounding_is_taken_and_every_decision_is_still_looked_at(monkeypatch):
    monkeypatch.setattr(engine, "by_inductor", off_by(1e-13))
    plain, compiled = ended(PLAIN), ended(COMPILED_RUN)
    assert [trace.why for trace in compiled[2]] == ["", COMPILED]
    x, expected = compiled[0].x["log_penalty"], plain[0].x["log_penalty"]
    assert not torch.equal(x, expected)
    assert torch.allclose(x, expected, rtol=1e-9)
    assert "inductor" not in compiled[0].warned


@pytest.mark.parametrize(("pays", "at"), [(0, 3), (4, 7)])
def test_a_record_is_compiled_once_it_was_replayed_some_times(pays, at, monkeypatch):
    monkeypatch.setattr(replayed, "PAYS", pays)
    monkeypatch.setattr(engine, "by_inductor", off_by(1e-13))
    longer = replace(PLAIN, upper=replace(PLAIN.upper, steps=12))
    plain, compiled = ended(longer), ended(replace(longer, compile="inductor"))
    assert [(trace.why, trace.step) for trace in compiled[2]] == [("", 2), (COMPILED, at)]
    norms = [[step.hypergradient_norm for step in run[1]] for run in (plain, compiled)]
    same = [one == other for one, other in zip(*norms, strict=True)]
    # the first compiled step is compared with the step itself, which is kept
    assert same == [True] * (at + 1) + [False] * (12 - at - 1)


def test_records_of_steps_that_go_on_to_differ_are_not_compiled(monkeypatch):
    monkeypatch.setattr(replayed, "PAYS", 10)
    monkeypatch.setattr(engine, "by_inductor", off_by(1e-13))
    assert [trace.why for trace in ended(COMPILED_RUN)[2]] == [""]


class Meeting:
    """G = ½‖y − x‖², F = ½‖y − a‖²: the hypergradient y − a comes to rounding alone."""

    def init(self, streams):
        zeros = torch.zeros(3, dtype=torch.float64)
        return {"x": zeros}, {"y": zeros + 1}

    def upper_loss(self, x, y, batch):
        return (y["y"] - torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)).square().sum() / 2

    def lower_loss(self, x, y, batch):
        return (y["y"] - x["x"]).square().sum() / 2

    def upper_batches(self, generator):
        return itertools.repeat(None)

    lower_batches = upper_batches


MEETING = setup(
    Meeting(),
    Unroll(memory="store"),
    steps=72,
    lower=Gradient(steps=2, optimizer=SGD(lr=0.3)),
    optimizer=SGD(lr=0.5),
    compile="inductor",
)


def another_last_digit(region, given):
    """A compiler that rounds otherwise: what a region is given is another number in its last digit."""

    def call(args):
        return region(
            *(a * (1 + 2.3e-16) if a.is_floating_point() and a.dim() else a for a in args)
        )

    return call


def test_where_a_run_has_converged_rounding_does_not_end_it(monkeypatch):
    monkeypatch.setattr(engine, "by_inductor", another_last_digit)
    monkeypatch.setattr(replayed, "EVERY", 4)
    state, steps, traces, _ = ended(MEETING)
    assert [trace.why for trace in traces] == ["", COMPILED]
    assert 0 < steps[-1].hypergradient_norm < 1e-9  # of terms of 0.7: 1e-16 is 1e-7 of it
    assert "inductor" not in state.warned


def test_what_is_no_rounding_ends_it_there_too(monkeypatch):
    """A millionth of what has come to 1e-8: nothing beside the terms, and no rounding of them."""
    monkeypatch.setattr(engine, "by_inductor", off_by(1e-6, after=40))
    monkeypatch.setattr(replayed, "EVERY", 4)
    with pytest.raises(ProblemError, match="farther from the step's than rounding"):
        ended(MEETING)


@pytest.mark.parametrize("fails", ["is wrong", "is none"])
def test_a_compiler_that_is_wrong_or_none_leaves_the_replay_as_it_is(fails, monkeypatch):
    def none(region, given):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(engine, "by_inductor", off_by(1e-3) if fails == "is wrong" else none)
    plain, compiled = ended(PLAIN), ended(COMPILED_RUN)
    assert compiled[0].warned.pop("inductor") == 0
    require_same(plain, compiled)
    (said,) = [e.message for e in engine_warnings(COMPILED_RUN)]
    assert ("other numbers than the step" if fails == "is wrong" else "no C++ compiler") in said


def engine_warnings(s):
    return [e for e in engine.run(s, engine.start(s)) if getattr(e, "kind", "") == "inductor"]


def test_what_is_wrong_later_ends_the_run(monkeypatch):
    monkeypatch.setattr(replayed, "EVERY", 3)
    monkeypatch.setattr(engine, "by_inductor", off_by(1e-3, after=2))
    with pytest.raises(ProblemError, match=r"Up to 2 steps before it may be others too") as caught:
        ended(COMPILED_RUN)
    assert "farther from the step's than rounding" in str(caught.value)


def test_the_terminal_says_that_it_was_compiled(monkeypatch):
    monkeypatch.setattr(engine, "by_inductor", off_by(0.0))
    out = io.StringIO()
    receiver = ConsoleReceiver(Console(file=out, width=80))
    for event in engine.run(COMPILED_RUN, engine.start(COMPILED_RUN)):
        receiver.receive(event)
    assert "step 3: record 1 compiled: " in out.getvalue()


# how far rounding may take a step


def feed_of(*batches):
    feed = Feed({"lower": iter(batches)})
    for _ in range(2):
        feed.draw("lower")
    return feed


INPUTS = {
    "x": {"x": torch.ones(3, dtype=torch.float64)},
    "y": {"y": torch.ones(3, dtype=torch.float64)},
    "lower": {"step": torch.tensor(5.0)},  # as Adam counts, in float32
}


def test_what_differs_in_the_last_digit_is_moved_and_counters_are_not():
    found = sameness.perturbed(lambda inputs, draws: inputs, INPUTS, feed_of(1, 2), INPUTS)
    assert torch.equal(found["lower"]["step"], INPUTS["lower"]["step"])
    away = (found["x"]["x"] - 1).abs()
    assert away.max() == torch.finfo(torch.float64).eps
    assert away.min() > 0


def test_a_step_that_takes_another_way_says_nothing_of_rounding():
    def step(inputs, draws):
        steps = 1 if bool((inputs["x"]["x"] == 1).all()) else 2
        return {"steps": steps, "drawn": [next(draws["lower"]) for _ in range(steps)]}

    feed = feed_of(1, 2, 3)
    truth = step(INPUTS, feed.taken())
    assert sameness.perturbed(step, INPUTS, feed, truth) is None
    assert (
        sameness.perturbed(lambda *given: {"steps": 1, "drawn": [1]}, INPUTS, feed, truth) == truth
    )


def test_no_batch_is_drawn_that_the_step_did_not_draw():
    feed = feed_of(1, 2, 3)
    many = sameness.perturbed(
        lambda inputs, draws: [next(draws["lower"]) for _ in range(3)], INPUTS, feed, [1, 2, 3]
    )
    assert many is None
    assert feed.draw("lower") == 3


def test_an_infinity_is_near_nothing():
    one, far = torch.tensor([7.0, 1.0]), torch.tensor([torch.inf, 1.0])
    assert not sameness.is_same(one, far, 1e-8)
    assert not sameness.is_same(7.0, torch.inf, 1e-8)
    assert not sameness.is_same(one, one + 1, 1e-8, far)
    assert sameness.is_same(one, one + 1e-9, 1e-8)  # control
