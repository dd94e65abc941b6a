"""Schedule, clipping, accumulation and the answer to what is not finite, in a run."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.events import Evaluated, Finished, Held, Stepped, Warned
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers import SGD, Adam, Clip, Schedule
from bilevel.problem.estimation import estimate
from bilevel.run import nonfinite
from bilevel.run.accumulation import mean, together
from bilevel.run.engine import restore, run, start
from bilevel.run.upper import Upper
from bilevel.types import Estimate, LowerSolution, LowerStats, Point, Stats
from tests.run.setups import Noisy, frozen, same, setup

HALVING = Schedule(name="ExponentialLR", options={"gamma": 0.5})


def of(upper, problem=None, **options):
    return replace(setup(problem or Noisy(), **options), upper=upper)


def steps(s, state=None):
    return [event for event in run(s, state or start(s)) if isinstance(event, Stepped)]


class Line:
    """F = y, G = (y − x)²/2 from y = 0, so that dΦ/dx = 1 at every x: a step is as long as its rate."""

    def init(self, streams):
        zero = torch.tensor(0.0, dtype=torch.float64)
        return {"x": zero}, {"y": zero.clone()}

    def upper_loss(self, x, y, batch):
        return 8 * y["y"]

    def lower_loss(self, x, y, batch):
        return 0.5 * (y["y"] - x["x"]).square()

    def upper_batches(self, generator):
        return itertools.repeat(None)

    lower_batches = upper_batches

    def evaluate(self, x, y):
        return {"x": float(x["x"])}


def line(upper):
    return of(upper, Line(), lower=Gradient(steps=1, optimizer=SGD(lr=1.0)))


def test_the_rate_of_each_step():
    """1 + 1/2 + 1/4 + 1/8 times 8."""
    s = line(Upper(steps=4, optimizer=SGD(lr=1.0), schedule=HALVING))
    state = start(s)
    assert [event.hypergradient_norm for event in steps(s, state)] == [8.0] * 4
    assert float(state.x["x"]) == -15.0


def test_what_is_clipped_is_what_the_optimizer_gets():
    s = line(Upper(steps=4, optimizer=SGD(lr=1.0), clip=Clip(norm=0.5)))
    state = start(s)
    assert [event.hypergradient_norm for event in steps(s, state)] == [8.0] * 4  # as it was
    assert float(state.x["x"]) == -2.0


class Batches(Noisy):
    """Remembers what it was asked for."""

    def __init__(self):
        object.__setattr__(self, "seen", {"upper": [], "lower": []})

    def upper_loss(self, x, y, batch):
        self.seen["upper"].append(batch)
        return super().upper_loss(x, y, batch)


@pytest.mark.parametrize("estimator", [Implicit(solver=CG(iterations=9)), Unroll()], ids=repr)
def test_an_accumulated_step_is_along_the_mean(estimator):
    """By hand: the same lower solve, and the mean of three hypergradients on the batches that come."""
    s = of(Upper(steps=1, optimizer=SGD(lr=1.0), accumulate=3), estimator=estimator)
    state, first = start(s), start(s)
    (event,) = steps(s, state)

    levels, needs = s.levels, estimator.needs
    solution = levels.solve(
        s.lower, first.x, first.y, batches=first.lower_batches, state=first.lower, record=needs.path
    )
    total, at = tree.zeros_like(first.x), None
    for k in range(3):
        batch = solution.batch if k == 0 or needs.path else next(first.lower_batches)
        losses = levels.losses(next(first.upper_batches), batch)
        found = estimate(estimator, losses, Point(first.x, solution.y, solution.path), at)
        total, at = tree.add(total, found.hypergradient), found.state
    by_hand = {name: first.x[name] - entry / 3 for name, entry in total.items()}
    for name, entry in by_hand.items():
        torch.testing.assert_close(state.x[name], entry, rtol=1e-12, atol=1e-14)
    alone = replace(s, upper=replace(s.upper, accumulate=1))
    other = start(alone)
    steps(alone, other)
    assert not torch.allclose(tree.flatten(other.x), tree.flatten(state.x), rtol=1e-3)
    assert event.estimate.gradients >= 3


class Weighted(Line):
    """F = (y − u)², G = (b (y − 1)² + x y²)/2 on a batch b, from x = 1/4 and y = 1/2."""

    def init(self, streams):
        at = torch.tensor([0.25, 0.5], dtype=torch.float64)
        return {"x": at[0]}, {"y": at[1]}

    def upper_loss(self, x, y, batch):
        return (y["y"] - batch).square()

    def lower_loss(self, x, y, batch):
        return 0.5 * (batch * (y["y"] - 1).square() + x["x"] * y["y"].square())

    def upper_batches(self, generator):
        return itertools.cycle([torch.tensor(1.0), torch.tensor(2.0)])

    def lower_batches(self, generator):
        return itertools.cycle(map(torch.tensor, (0.5, 1.5, 3.0, 7.0, 9.0, 2.0, 4.0)))


@pytest.mark.parametrize(("accumulate", "means"), [(2, (1.0, 5.0)), (1, (0.5, 1.5))])
def test_each_hypergradient_is_on_as_many_lower_batches_as_a_lower_step(accumulate, means):
    """dΦ/dx = −y F_y / (b + x), with b the mean over the batches of that hypergradient alone."""
    lower = Gradient(steps=1, optimizer=SGD(lr=0.1), accumulate=accumulate)
    s = of(Upper(steps=1, optimizer=SGD(lr=1.0), accumulate=2), Weighted(), lower=lower)
    state = start(s)
    steps(s, state)
    y = 0.5 - 0.1 * (means[0] * (0.5 - 1) + 0.25 * 0.5)
    found = [-y * 2 * (y - u) / (b + 0.25) for u, b in zip((1.0, 2.0), means, strict=True)]
    assert float(state.x["x"]) == pytest.approx(0.25 - sum(found) / 2, rel=1e-12)
    assert state.lower_batches.drawn == 2 * accumulate


class Episodes(Noisy):
    """Tasks: a lower and an upper batch that belong together."""

    def episodes(self, generator):
        while True:
            task = torch.randn(5, 3, generator=generator)
            yield task, task

    def lower_start(self, x, y):
        return {"w": x["log_penalty"] + 1}


def test_each_hypergradient_of_an_episode_has_its_own_solve():
    """A step over two episodes is the mean of the two steps that take one each from the same x."""
    s = of(Upper(steps=1, optimizer=SGD(lr=1.0), accumulate=2), Episodes(), estimator=Unroll())
    state = start(s)
    (event,) = steps(s, state)
    assert event.lower.steps == 2 * 5

    single = replace(s, upper=Upper(steps=2, optimizer=SGD(lr=1.0)))
    first = start(single)
    steps(replace(single, upper=Upper(steps=1, optimizer=SGD(lr=1.0))), first)
    second = start(single)
    next(second.upper_batches)
    second.upper_batches.renew()
    steps(replace(single, upper=Upper(steps=1, optimizer=SGD(lr=1.0))), second)
    for name, entry in state.x.items():
        both = (first.x[name] + second.x[name]) / 2
        torch.testing.assert_close(entry, both, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(entry, first.x[name], rtol=1e-3)


class Cliff(Line):
    """F = −8 log(1 + y), not a number beyond y = −1."""

    def upper_loss(self, x, y, batch):
        return 8 * torch.log(1 + y["y"])


def test_a_step_too_far_is_halved():
    """x = −8 at rate 1, then −4, −2, −1 (log 0 is infinite), −1/2, where dΦ/dx = 16 leads beyond again."""
    s = of(
        Upper(steps=2, optimizer=SGD(lr=1.0), nonfinite="halve"),
        Cliff(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
    )
    state = start(s)
    events = list(run(s, state))
    first, second = (event for event in events if isinstance(event, Stepped))
    assert first.upper_loss == 0.0
    assert second.upper_loss == pytest.approx(8 * math.log(0.5))
    assert float(state.x["x"]) == -0.5 - 16
    (warned,) = (event for event in events if isinstance(event, Warned))
    assert warned.kind == "halved"
    assert (warned.step, warned.message.partition(" =")[0]) == (2, "upper_loss")
    assert "16 times shorter" in warned.message
    assert state.warned["halved"] == 1


def test_a_start_that_is_not_finite_has_no_step_to_halve():
    class Below(Cliff):
        def init(self, streams):
            x, y = super().init(streams)
            return tree.map(lambda entry: entry - 3, x), y

    s = of(
        Upper(steps=2, nonfinite="halve"),
        Below(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
    )
    with pytest.raises(ConvergenceError, match="no step before this to halve"):
        list(run(s, start(s)))


def test_halving_ends(monkeypatch):
    s = of(
        Upper(steps=2, optimizer=SGD(lr=1e6), nonfinite="halve"),
        Cliff(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
    )
    with pytest.raises(ConvergenceError, match="1024 times shorter"):
        list(run(s, start(s)))
    monkeypatch.setattr(nonfinite, "MOST", 23)  # negative control: 8e6 / 2²³ < 1
    list(run(s, start(s)))


class Faulty(Line):
    """Each third upper batch is NaN."""

    last = 3

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) + batch

    def upper_batches(self, generator):
        for k in itertools.count(1):
            yield torch.tensor(0.0 if k % self.last else math.nan, dtype=torch.float64)


def faulty(policy, problem=None, n=7):
    return of(
        Upper(steps=n, optimizer=SGD(lr=1.0), nonfinite=policy),
        problem or Faulty(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
        evaluate_held=True,
    )


def test_a_step_is_skipped_and_counted():
    s = faulty("skip")
    state = start(s)
    events = list(run(s, state))
    found = [event for event in events if isinstance(event, Stepped)]
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [math.isnan(event.upper_loss) for event in found] == [k % 3 == 0 for k in range(1, 8)]
    assert float(state.x["x"]) == -8.0 * 5
    (warned,) = (event for event in events if isinstance(event, Warned))
    assert (warned.step, warned.kind) == (3, "skipped")
    assert events[-1] == replace(events[-1], reason="done", warned={"skipped": 2})
    with pytest.raises(ConvergenceError, match="step 3: upper_loss = nan"):
        list(run(faulty("halt"), start(faulty("halt"))))


def test_skipping_without_end_ends():
    class Lost(Faulty):
        last = 1

    s = faulty("skip", Lost(), n=20)
    state = start(s)
    with pytest.raises(ConvergenceError, match="so it was in the 10 steps before"):
        list(run(s, state))
    assert state.step == 10
    assert state.warned == {"skipped": 10}


class Gaps(Noisy):
    """Not finite for some batches."""

    def lower_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) + (x["log_penalty"].exp() * y["w"] ** 2).sum()

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) + torch.where(batch.sum() > 2, math.nan, 0.0)


class NoisyCliff(Cliff):
    """Steps of an unequal length, some of them too long."""

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, y, batch) * batch

    def upper_batches(self, generator):
        while True:
            yield torch.rand((), generator=generator, dtype=torch.float64)


RESUMABLE = {
    "schedule": of(Upper(steps=6, schedule=HALVING)),
    "clip": of(Upper(steps=6, optimizer=Adam(lr=0.05), clip=Clip(norm=0.1, value=0.05))),
    "accumulate": of(Upper(steps=6, accumulate=3)),
    "accumulate episodes": of(Upper(steps=6, accumulate=2), Episodes()),
    "skip": of(Upper(steps=6, nonfinite="skip"), Gaps()),
    "halve": of(
        Upper(steps=6, optimizer=SGD(lr=1.0), clip=Clip(norm=4.0), nonfinite="halve"),
        NoisyCliff(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
    ),
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_resuming_is_bit_identical(name):
    s = RESUMABLE[name]
    whole = start(s)
    log = steps(s, whole)
    expected = {"skip": {"skipped"}, "halve": {"halved"}}.get(name, set())
    assert expected <= whole.warned.keys()
    for stop in range(1, 6):
        first = start(s)
        for event in run(s, first):
            if isinstance(event, Stepped) and event.step == stop:
                break
        again = restore(s, frozen(first.save()))
        rest = steps(s, again)
        assert same(again.save(), whole.save())
        assert str([e.upper_loss for e in rest]) == str([e.upper_loss for e in log[stop:]])


@pytest.mark.parametrize(("name", "lost"), [("skip", "recovery"), ("halve", "recovery")])
def test_what_the_policies_keep_matters(name, lost):
    """Negative control: without it a run that is resumed ends otherwise."""
    s = faulty("skip", type("Lost", (Faulty,), {"last": 1})(), n=20) if name == "skip" else None
    s = s or of(
        Upper(steps=3, optimizer=SGD(lr=1.0), nonfinite="halve"),
        Cliff(),
        lower=Gradient(steps=1, optimizer=SGD(lr=1.0)),
    )
    first = start(s)
    for event in run(s, first):
        if isinstance(event, Stepped) and event.step == 1:
            break
    saved = first.save()
    saved.pop(lost)
    again = restore(s, copy.deepcopy(saved))
    with pytest.raises(ConvergenceError, match="so it was in" if name == "skip" else "before this"):
        list(run(s, again))
    assert again.step == (11 if name == "skip" else 1)


def test_the_control_draws_what_the_run_draws():
    """Accumulation takes batches of G too: y of the control is that of a run whose x stays."""

    class Still(SGD):
        def step(self, y, gradient, state):
            return y, state

    class Measured(Noisy):
        def evaluate(self, x, y):
            return {"w": float(y["w"].sum())}

    class MeasuredEpisodes(Episodes):
        def evaluate(self, x, y):
            return {"w": float(y["w"].sum())}

    several = Gradient(steps=2, optimizer=SGD(lr=0.1), accumulate=2)
    for problem, options in (
        (Measured(), {}),
        (Measured(), {"lower": several}),
        (MeasuredEpisodes(), {}),
    ):
        upper = Upper(steps=4, optimizer=Still(), accumulate=3)
        s = replace(of(upper, problem, **options), evaluate_held=True)
        events = list(run(s, start(s)))
        (control,) = (event.metrics for event in events if isinstance(event, Held))
        last = [event.metrics for event in events if isinstance(event, Evaluated)][-1]
        assert control == last
        assert isinstance(events[-1], Finished)


def test_the_evidence_of_several_is_the_worst():
    one = Stats(2, 3, 1, 5, residual=1e-9, curvature=0.5, converged=True, stopped="tolerance")
    other = replace(
        one, residual=1e-3, curvature=-0.1, converged=False, stopped="curvature", error_bound=2.0
    )
    one = replace(one, value_error=0.5, damping_residual=0.1)
    other = replace(other, value_error=-2.0, damping_residual=0.2)

    def estimate(h, stats, reasons=()):
        return Estimate({"x": torch.tensor(h)}, torch.tensor(h), None, stats, reasons=reasons)

    found = mean([estimate(1.0, one), estimate(4.0, other, ("why",)), estimate(4.0, one)])
    assert (float(found.hypergradient["x"]), float(found.value)) == (3.0, 3.0)
    assert found.reasons == ("why",)
    stats = found.stats
    assert (stats.gradients, stats.hvps, stats.cross_products, stats.iterations) == (6, 9, 3, 15)
    assert (stats.residual, stats.curvature, stats.stopped) == (1e-3, -0.1, "curvature")
    assert (stats.converged, stats.error_bound) == (False, None)
    assert (stats.value_error, stats.damping_residual) == (0.5, 0.2)
    assert mean([estimate(1.0, other), estimate(1.0, replace(other, error_bound=4.0))]).stats == (
        replace(other, gradients=4, hvps=6, cross_products=2, iterations=10, error_bound=3.0)
    )


def test_the_solves_of_several_episodes_are_counted_together():
    solves = [
        LowerSolution({}, stats=LowerStats(3, 4, 1.0, 0.5, converged, hvps=1, stopped=stopped))
        for converged, stopped in ((False, "iterations"), (True, "tolerance"))
    ]
    stats = together(solves).stats
    assert stats == LowerStats(6, 8, 1.0, 0.5, False, hvps=2, stopped="tolerance")


def test_batches_that_y_was_not_solved_on_say_nothing_of_the_lower_solve():
    """∇y G of another batch is not zero at the solution of this one, however well that is solved."""
    s = of(Upper(steps=3, optimizer=SGD(lr=1e-2), accumulate=4), Noisy(), lower=LBFGS())
    found = [event for event in run(s, start(s)) if isinstance(event, Stepped)]
    assert len(found) == 3
    for event in found:
        assert event.lower.converged
        assert abs(event.estimate.value_error) < 1e-4 * abs(event.upper_loss)
