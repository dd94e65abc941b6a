"""The engine: its events, equality with a hand-written loop, and what it asks of a problem."""

from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel import tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.events import (
    Drawn,
    Evaluated,
    Finished,
    Progress,
    Started,
    Stepped,
    Tabulated,
    Warned,
)
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import Streams
from bilevel.run import engine
from bilevel.run.engine import prepare, run, start
from bilevel_problems.quadratic import Quadratic
from tests.run.setups import Noisy, setup


def test_the_events_of_a_run_in_order():
    events = list(run(s := setup(evaluate_every=4), start(s)))
    assert isinstance(events[0], Started)
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 4, 6]
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "done"
    assert (events[0].num_upper, events[0].num_lower) == (5, 10)


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_equals_a_loop_written_by_hand():
    """Five steps of SGD below, one implicit hypergradient, one Adam step above; four times."""
    s = setup(steps=4)
    state = start(s)
    list(run(s, state))
    problem, batch = s.problem, next(s.problem.lower_batches(None))
    x, y = problem.init(Streams(0))
    x_param = x["x"].clone().requires_grad_()
    y_param = y["y"].clone().requires_grad_()
    above = torch.optim.Adam([x_param], lr=0.05)
    below = torch.optim.SGD([y_param], lr=0.3, momentum=0.5)
    v = None
    for _ in range(4):
        for _ in range(5):
            below.zero_grad()
            problem.lower_loss({"x": x_param.detach()}, {"y": y_param}, batch).backward()
            below.step()
        estimate = bilevel.hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            {"x": x_param},
            {"y": y_param},
            estimator=s.estimator,
            upper_batch=batch,
            lower_batch=batch,
            state=v,
        )
        v = estimate.state
        x_param.grad = estimate.hypergradient["x"]
        above.step()
    torch.testing.assert_close(state.x["x"], x_param.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.y["y"], y_param.detach(), rtol=1e-12, atol=1e-12)


def test_reaches_the_bilevel_solution():
    """On the quadratic the closed-form hypergradient vanishes at the end, and did not before."""
    s = setup(
        steps=80,
        lower=Gradient(steps=10, optimizer=SGD(lr=0.9)),
        optimizer=SGD(lr=0.1),
        problem=Quadratic(condition=3.0),
        estimator=Implicit(solver=CG(iterations=20, tolerance=1e-10)),
    )
    events = list(run(s, start(s)))
    norms = [e.metrics["hypergradient norm"] for e in events if isinstance(e, Evaluated)]
    assert norms[-1] < 1e-3 * norms[0]
    wrong = replace(s, estimator=Alternating())  # control: without the implicit term it does not
    events = list(run(wrong, start(wrong)))
    assert [e for e in events if isinstance(e, Evaluated)][-1].metrics["hypergradient norm"] > 0.1


def test_the_seed_decides_the_run():
    def end(seed):
        s = setup(Noisy(), seed=seed)
        state = start(s)
        list(run(s, state))
        return tree.flatten(state.x)

    assert torch.equal(end(1), end(1))
    assert not torch.equal(end(1), end(2))


def test_no_global_random_state_is_used():
    s = setup(Noisy())
    before = torch.random.get_rng_state()
    list(run(s, start(s)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_totals_add_up():
    s = setup(steps=3)
    steps = [e for e in run(s, start(s)) if isinstance(e, Stepped)]
    assert steps[-1].totals.gradients == 3 * (5 + 2)
    assert steps[-1].totals.hvps == sum(e.estimate.hvps for e in steps)
    assert steps[-1].totals.cross_products == 3


def test_one_level_problems_run_without_a_hypergradient():
    class Single(Noisy):
        def init(self, streams):
            return {}, super().init(streams)[1]

        def lower_loss(self, x, y, batch):
            return self.upper_loss(x, y, batch)

    s = setup(Single(), Unroll(), steps=40, lower=Gradient(steps=5, optimizer=SGD(lr=0.03)))
    steps = [e for e in run(s, start(s)) if isinstance(e, Stepped)]
    assert all(e.hypergradient_norm == 0 and e.estimate.hvps == 0 for e in steps)
    assert steps[-1].upper_loss < steps[0].upper_loss


def test_what_a_problem_may_add_is_called():
    calls = []

    class Full(Noisy):
        def prepare(self):
            yield Progress("data", 1, 1)

        def place(self, device, dtype):
            calls.append(("place", str(device), dtype))
            return [Progress("memory", 1, 1)]

        def lower_start(self, x, y):
            calls.append("lower_start")
            return tree.zeros_like(y)

        def project_upper(self, x):
            return tree.map(lambda p: p.clamp(max=-0.5), x)

        def project_lower(self, y):
            return tree.map(lambda p: p.clamp(max=0.1), y)

        def evaluate(self, x, y):
            yield Progress("evaluate", 1)
            return {"largest": float(y["w"].max())}

        def figures(self, x, y):
            return {"map": "a figure"}

    s = setup(Full(), steps=2)
    assert [e.stage for e in prepare(s)] == ["data", "memory"]
    state = start(s)
    events = list(run(s, state))
    starts = ["lower_start"] * 3  # one of them before the first step, to see what it draws from
    assert calls == [("place", "cpu", torch.float64), *starts]
    assert float(state.x["log_penalty"].max()) <= -0.5
    assert [e for e in events if isinstance(e, Evaluated)][-1].metrics["largest"] <= 0.1
    assert [e.name for e in events if isinstance(e, Drawn)] == ["map"]


def test_what_is_measured_before_and_drawn_may_be_left_out_and_the_run_is_the_same():
    class Shown(Noisy):
        def evaluate(self, x, y):
            return {"largest": float(y["w"].max())}

        def figures(self, x, y):
            return {"map": "a figure"}

    def seen(**options):
        s = replace(setup(Shown(), steps=4), evaluate_every=2, **options)
        state = start(s)
        found = list(run(s, state))
        measured = {e.step: e.metrics for e in found if isinstance(e, Evaluated)}
        return measured, sum(isinstance(e, Drawn) for e in found), tree.flatten(state.x)

    whole, drawn, x = seen()
    assert ([*whole], drawn) == ([0, 2, 4], 1)
    less, undrawn, same = seen(evaluate_before=False, draw=False)
    assert (less, undrawn) == ({step: whole[step] for step in (2, 4)}, 0)
    assert torch.equal(x, same)


def test_a_problem_may_be_prepared_on_the_runs_device():
    """Once placed, `init` would come too late for what is trained in `prepare`."""
    calls: list[str] = []

    class Slow(Noisy):
        def prepare(self, device):
            calls.append(f"prepare on {device}")
            yield Progress("data", 1, 1)

        def place(self, device, dtype):
            calls.append(f"place on {device}")

    s = replace(setup(Slow(), steps=2), device=torch.device("meta"))
    assert [e.stage for e in prepare(s)] == ["data"]
    assert calls == ["prepare on meta", "place on meta"]


def test_what_a_problem_yields_while_it_measures_bears_the_step():
    class Telling(Noisy):
        def evaluate(self, x, y):
            yield Progress("evaluate", 1)
            yield Tabulated(0, "cases", ({"id": "a"},))
            yield Warned(0, "odd", "as it is")
            return {"measure": 1.0}

    s = setup(Telling(), steps=2)
    told = [e for e in run(s, start(s)) if isinstance(e, (Tabulated, Warned, Evaluated))]
    kinds = [(type(e).__name__, e.step) for e in told if getattr(e, "kind", "odd") == "odd"]
    once = ["Tabulated", "Warned", "Evaluated"]
    assert kinds == [(kind, step) for step in (0, 2) for kind in once]
    assert told[0].rows == ({"id": "a"},)


def test_a_cold_start_forgets_momentum():
    """With `lower_start` every lower solve is the same function of x."""

    class Cold(Quadratic):
        def lower_start(self, x, y):
            return tree.zeros_like(y)

    s = setup(Cold(), steps=2, optimizer=SGD(lr=1e-300))  # x stays
    steps = [e for e in run(s, start(s)) if isinstance(e, Stepped)]
    assert steps[0].lower_loss == steps[1].lower_loss


def test_a_loss_that_is_not_finite_stops_at_its_step_and_leaves_the_last_good_state():
    class Breaks(Noisy):
        def upper_loss(self, x, y, batch):
            return super().upper_loss(x, y, batch) * (1 if x["log_penalty"].max() < 0.1 else 1e400)

    s = setup(Breaks(), lower=Gradient(optimizer=SGD(lr=0.03)), steps=50)
    state = start(s)
    with pytest.raises(ConvergenceError, match=r"step \d+: lower_loss = inf"):
        list(run(s, state))
    assert tree.is_finite(state.x)
    assert state.step > 0


def test_senseless_combinations_are_refused_before_anything_slow():
    s = setup(Noisy(), Unroll(), lower=LBFGS())
    with pytest.raises(
        ProblemError, match=r"unroll differentiates.*lower: lbfgs cannot.*lower: gradient"
    ):
        list(prepare(s))
    s = setup(problem=object())
    with pytest.raises(ProblemError, match=r"object is not a Problem: it lacks init"):
        list(prepare(s))


def test_batches_that_end_are_refused():
    class Short(Noisy):
        def upper_batches(self, generator):
            return iter([torch.ones(5, 3)])

    s = setup(Short())
    with pytest.raises(ProblemError, match=r"upper.batches ended after 1 .*itertools.repeat"):
        list(run(s, start(s)))


def test_empty_or_tied_variables_are_refused():
    class Empty(Noisy):
        def init(self, streams):
            return super().init(streams)[0], {}

    class Tied(Noisy):
        def init(self, streams):
            x, y = super().init(streams)
            return x, {"w": y["w"], "again": y["w"]}

    with pytest.raises(ProblemError, match="y is empty"):
        start(setup(Empty()))
    with pytest.raises(ProblemError, match="one tensor under two names"):
        start(setup(Tied()))


def test_only_the_public_parts_are_needed():
    assert {"Setup", "State", "prepare", "start", "restore", "run"} <= set(dir(engine))


def test_an_upper_step_to_infinity_is_an_error():
    s = setup(steps=2, optimizer=SGD(lr=1e308))
    with pytest.raises(ConvergenceError, match=r"the upper step made .* lower upper.optimizer.lr"):
        list(run(s, start(s)))


def test_early_stopping_at_the_start_leaves_unrolling_something_to_say():
    """Within its tolerance the lower level takes no step; the path is empty and y_K = y_0."""
    s = setup(estimator=Unroll(), lower=Gradient(steps=9, tolerance=1e6), steps=3)
    steps = [e for e in run(s, start(s)) if isinstance(e, Stepped)]
    assert [e.lower.steps for e in steps] == [0, 0, 0]
    assert all(e.hypergradient_norm > 0 for e in steps)


@pytest.mark.parametrize("compiled", ["off", "step"])
def test_without_lower_steps_y_stays_and_losses_are_those_there(compiled):
    s = setup(lower=Gradient(steps=0), compile=compiled)
    state = start(s)
    x, y = state.x, state.y
    first, *others = [e for e in run(s, state) if isinstance(e, Stepped)]
    G = s.problem.lower_loss(x, y, next(s.problem.lower_batches(None)))
    assert first.lower_loss == pytest.approx(G.item())
    assert (first.lower.steps, first.lower.gradients) == (0, 1)
    assert first.lower.gradient_norm > 0
    assert tree.equal(state.y, y)
    assert not tree.equal(state.x, x)
    assert all(e.lower_loss == e.lower_loss for e in others)  # none is NaN
