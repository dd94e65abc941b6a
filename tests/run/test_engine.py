"""The engine: events, equality with a hand-written loop, and resuming byte for byte."""

import itertools
import random
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import tree
from bilevel.errors import CheckpointError, ConvergenceError, ProblemError
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.events import Drawn, Evaluated, Finished, Progress, Started, Stepped, Warned
from bilevel.linear.cg import CG
from bilevel.linear.neumann import Neumann
from bilevel.linear.nystrom import Nystrom
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.run.batches import RTOL, Sampler, glimpse
from bilevel.run.engine import Setup, prepare, restore, run, start
from bilevel.run.upper import Upper
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.quadratic import Quadratic


@dataclass(frozen=True)
class Noisy:
    """A stochastic problem in the fewest lines: shuffled epochs, kept by a plain generator."""

    def init(self, streams):
        y = torch.randn(3, generator=streams["init"])
        return {"log_penalty": torch.zeros(3)}, {"w": y}

    def upper_loss(self, x, y, batch):
        return ((batch @ y["w"] - 1) ** 2).mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + (x["log_penalty"].exp() * y["w"] ** 2).sum()

    def upper_batches(self, generator):
        while True:
            yield torch.randn(5, 3, generator=generator)

    def lower_batches(self, generator):
        data = torch.randn(20, 3, generator=stream(0, "data"))
        while True:  # shuffled epochs: the position within one is not in the generator
            for rows in torch.randperm(20, generator=generator).split(6):
                yield data[rows]


class Strided(Noisy):
    """y starts as a transposed view; sums over it depend on the order of its memory."""

    def init(self, streams):
        y = torch.randn(31, 30, generator=streams["init"]).T
        return {"log_penalty": torch.zeros(3)}, {"w": y}

    def upper_loss(self, x, y, batch):
        return super().upper_loss(x, {"w": y["w"][:3].sum(1)}, batch) + (y["w"] ** 2).mean()

    def lower_loss(self, x, y, batch):
        return self.upper_loss(x, y, batch) + (x["log_penalty"].exp().sum() * y["w"] ** 2).sum()


def setup(problem=None, estimator=None, steps=6, **options):
    return Setup(
        problem or Quadratic(),
        options.pop("lower", Gradient(steps=5, optimizer=SGD(lr=0.3, momentum=0.5))),
        Upper(steps=steps, optimizer=options.pop("optimizer", Adam(lr=0.05))),
        estimator or Implicit(solver=CG(iterations=4)),
        dtype=options.pop("dtype", torch.float64),
        **options,
    )


def same(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


def test_the_events_of_a_run_in_order():
    events = list(run(s := setup(evaluate_every=4), start(s)))
    assert isinstance(events[0], Started)
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 4, 6]
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "done"
    assert (events[0].num_upper, events[0].num_lower) == (5, 10)


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
        steps=400,
        lower=Gradient(steps=30, optimizer=SGD(lr=0.9)),
        optimizer=SGD(lr=0.02),
        problem=Quadratic(condition=3.0),
        estimator=Implicit(solver=CG(iterations=20, tolerance=1e-10)),
    )
    events = list(run(s, start(s)))
    norms = [e.metrics["hypergradient norm"] for e in events if isinstance(e, Evaluated)]
    assert norms[-1] < 1e-3 * norms[0]
    wrong = replace(s, estimator=Alternating())  # control: without the implicit term it does not
    events = list(run(wrong, start(wrong)))
    assert [e for e in events if isinstance(e, Evaluated)][-1].metrics["hypergradient norm"] > 0.1


RESUMABLE = {
    "quadratic, cg warm start": setup(),
    "hyper-cleaning, float32": setup(
        HyperCleaning(num_train=60, num_clean=40), dtype=torch.float32
    ),
    "shuffled epochs": setup(Noisy(), dtype=torch.float32),
    "unroll, adam below": setup(
        Noisy(), Unroll(), lower=Gradient(steps=4, optimizer=Adam(lr=0.05))
    ),
    "strided memory": setup(Strided(), lower=Gradient(steps=3, optimizer=Adam(lr=0.05))),
    "torch optimizers": setup(
        Noisy(),
        lower=Gradient(steps=3, optimizer=TorchOptimizer(optimizer="Adagrad")),
        optimizer=TorchOptimizer(optimizer="NAdam"),
    ),
}


@pytest.mark.parametrize("s", RESUMABLE.values(), ids=RESUMABLE)
def test_resuming_is_bit_identical(s):
    whole = start(s)
    log = [e for e in run(s, whole) if isinstance(e, Stepped)]
    for stop in (1, 4):
        first = start(s)
        for event in run(s, first):
            if isinstance(event, Stepped) and event.step == stop:
                break
        again = restore(s, _frozen(first.save()))
        rest = [e for e in run(s, again) if isinstance(e, Stepped)]
        assert same(again.save(), whole.save())
        assert [e.upper_loss for e in rest] == [e.upper_loss for e in log[stop:]]


def _frozen(saved):
    """A deep copy, as a checkpoint on disk is."""
    if isinstance(saved, torch.Tensor):
        return saved.clone()
    if isinstance(saved, dict):
        return {key: _frozen(value) for key, value in saved.items()}
    return saved


@pytest.mark.parametrize("lost", ["estimator", "lower", "upper", "lower_batches"])
def test_every_part_of_the_state_matters(lost):
    """Negative control: forgetting any part is seen."""
    s = setup(Noisy(), lower=Gradient(steps=3, optimizer=Adam(lr=0.05)))
    whole = start(s)
    list(run(s, whole))
    first = start(s)
    for event in run(s, first):
        if isinstance(event, Stepped) and event.step == 3:
            break
    saved = _frozen(first.save())
    saved[lost] = start(s).save()[lost]
    again = restore(s, saved)
    list(run(s, again))
    assert not torch.equal(tree.flatten(again.x), tree.flatten(whole.x))


def test_a_sampler_that_cannot_be_repeated_is_refused():
    class Stray(Noisy):
        def lower_batches(self, generator):
            while True:
                torch.randn(int(torch.randint(1, 9, ())), generator=generator)
                yield torch.randn(6, 3, generator=generator)

    s = setup(Stray())
    torch.manual_seed(0)
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 3:
            break
    with pytest.raises(CheckpointError, match=r"lower.batches cannot be resumed.*state_dict"):
        restore(s, state.save())


def _from_torch(generator):
    while True:
        yield torch.randn(6, 3)


def _from_numpy(generator):
    while True:
        yield {"rows": [np.random.randn(6, 3)], "name": "text"}


def _from_random(generator):
    while True:
        yield (torch.tensor([[random.random() for _ in range(3)] for _ in range(6)]), None)


def _shuffled_by_nobody(generator):
    while True:
        yield from (rows for (rows,) in DataLoader(TensorDataset(DATA), 6, shuffle=True))


def _shuffled_by_the_stream(generator):
    loader = DataLoader(TensorDataset(DATA), 6, shuffle=True, generator=generator)
    while True:
        yield from (rows for (rows,) in loader)


def _in_order(generator):
    """Takes a seed from the global state for workers that it has not, and gives the same batches."""
    while True:
        yield from (rows for (rows,) in DataLoader(TensorDataset(DATA), 6))


DATA = torch.randn(20, 3, generator=stream(0, "data"))


@pytest.mark.parametrize(
    ("make", "repeats"),
    [
        (_from_torch, False),
        (_from_numpy, False),
        (_from_random, False),
        (_shuffled_by_nobody, False),
        (_shuffled_by_the_stream, True),
        (_in_order, True),
    ],
)
def test_batches_from_a_global_random_state_are_not_resumed(make, repeats):
    def sampler(dtype=torch.float32):
        return Sampler(make, 0, "lower.batches", torch.device("cpu"), dtype)

    first = sampler()
    for _ in range(5):
        next(first)
    saved = first.save()
    if not repeats:
        with pytest.raises(CheckpointError, match=r"another batch.*generator=stream"):
            sampler().restore(saved)
        return
    again = sampler()
    again.restore(saved)
    assert same(again.save(), saved)
    for _ in range(5):
        assert torch.equal(next(again), next(first))


def test_a_batch_is_known_again_in_another_dtype():
    """A problem may place its data in the dtype of the run that goes on from a state."""
    batch = {"a": torch.randn(200, 7), "b": [torch.arange(5), 3.5]}
    seen = glimpse(batch)
    assert len(seen) == 64 + 5 + 1
    for dtype in (torch.float64, torch.bfloat16):
        moved = glimpse(tree.to(batch, torch.device("cpu"), dtype))
        assert torch.allclose(moved, seen, rtol=RTOL, atol=0)
    other = {"a": batch["a"].flip(0), "b": batch["b"]}
    assert not torch.allclose(glimpse(other), seen, rtol=RTOL, atol=0)


def test_an_iterator_with_a_position_resumes_by_it():
    class Counting:
        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return torch.full((2, 3), 1.0 / self.at)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    class Positioned(Noisy):
        def lower_batches(self, generator):
            return Counting()

    s = setup(Positioned())
    whole, first = start(s), start(s)
    list(run(s, whole))
    next(itertools.islice(run(s, first), 2, None))
    again = restore(s, _frozen(first.save()))
    assert 0 < again.step < 6
    list(run(s, again))
    assert same(again.save(), whole.save())


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
    assert [e.stage for e in prepare(s)] == ["data"]
    state = start(s)
    events = list(run(s, state))
    assert calls == [("place", "cpu", torch.float64), "lower_start", "lower_start"]
    assert float(state.x["log_penalty"].max()) <= -0.5
    assert [e for e in events if isinstance(e, Evaluated)][-1].metrics["largest"] <= 0.1
    assert [e.name for e in events if isinstance(e, Drawn)] == ["map"]


def test_a_cold_start_forgets_momentum():
    """With `lower_start` every lower solve is the same function of x."""

    class Cold(Quadratic):
        def lower_start(self, x, y):
            return tree.zeros_like(y)

    s = setup(Cold(), steps=2, optimizer=SGD(lr=1e-300))  # x stays
    steps = [e for e in run(s, start(s)) if isinstance(e, Stepped)]
    assert steps[0].lower_loss == steps[1].lower_loss


def test_negative_curvature_and_truncation_are_said_once():
    class Saddle(Quadratic):
        def lower_loss(self, x, y, batch):
            return super().lower_loss(x, y, batch) - 2 * y["y"][0] ** 2

    s = setup(Saddle(), lower=Gradient(steps=1, optimizer=SGD(lr=1e-3)), steps=4)
    warned = [e for e in run(s, start(s)) if isinstance(e, Warned)]
    assert [w.kind for w in warned] == ["curvature"]
    assert "damping" in warned[0].message
    s = setup(steps=4, estimator=Implicit(solver=CG(iterations=7)))
    warned = [e for e in run(s, start(s)) if isinstance(e, Warned)]
    assert [w.kind for w in warned] == ["adjoint"]
    s = setup(steps=4, estimator=Implicit(solver=CG(iterations=99)))
    assert not [e for e in run(s, start(s)) if isinstance(e, Warned)]


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
    with pytest.raises(ProblemError, match=r"object is no problem: it has no init"):
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


def test_a_projection_below_is_cautioned_about():
    class Boxed(Quadratic):
        def project_lower(self, y):
            return y

    s = setup(Boxed(), steps=1)
    assert "projection" in [e.kind for e in run(s, start(s)) if isinstance(e, Warned)]
    s = setup(Boxed(), Unroll(), steps=1)
    assert "projection" not in [e.kind for e in run(s, start(s)) if isinstance(e, Warned)]


@pytest.mark.parametrize(
    ("solver", "remedy"),
    [
        (Neumann(iterations=2), "raise estimator.solver.iterations, or take estimator.solver: cg"),
        (Nystrom(rank=1), "raise estimator.solver.rank, or take estimator.solver: cg"),
        (CG(iterations=1, tolerance=0.9), "raise estimator.solver.iterations, or look"),
    ],
    ids=repr,
)
def test_a_large_residual_is_said_whatever_converged_says(solver, remedy):
    """Once, with what it means and what helps, and counted at each step."""
    s = setup(steps=3, estimator=Implicit(solver=solver, start="cold"))
    events = list(run(s, start(s)))
    residuals = [e.estimate.residual for e in events if isinstance(e, Stepped)]
    assert min(residuals) > 0.1
    assert {e.estimate.converged for e in events if isinstance(e, Stepped)} <= {None, True}
    (warned,) = [e for e in events if isinstance(e, Warned)]
    assert (warned.step, warned.kind) == (1, "residual")
    assert remedy in warned.message
    assert f"{residuals[0]:.2g}" in warned.message
    assert events[-1].warned == {"residual": 3}


def test_a_small_residual_or_a_small_bound_is_not_warned_of():
    s = setup(steps=3, estimator=Implicit(solver=Neumann(iterations=500, scale=0.5)))
    events = list(run(s, start(s)))
    assert not [e for e in events if isinstance(e, Warned)]
    assert events[-1].warned == {}
    bounds = {"strong_convexity": 0.1, "cross_norm": 1e-6}  # as if x hardly moved y
    s = setup(steps=1, estimator=Implicit(solver=CG(iterations=1, tolerance=0.9), **bounds))
    events = list(run(s, start(s)))
    assert [e.estimate.residual > 0.1 for e in events if isinstance(e, Stepped)] == [True]
    assert not [e for e in events if isinstance(e, Warned)]


class Scaled(Quadratic):
    """G times a constant: another G with the same y*, the same hypergradient."""

    def lower_loss(self, x, y, batch):
        return SCALE * super().lower_loss(x, y, batch)


SCALE = 1e-12


@pytest.mark.parametrize("solver", [Newton(), LBFGS()], ids=repr)
def test_a_tolerance_that_says_nothing_at_the_scale_of_g_is_said(solver):
    """‖∇y G‖ ≤ 1e-10 is met at the start, where y is nowhere near y*."""
    s = setup(Scaled(), steps=2, lower=solver, estimator=Implicit())
    state = start(s)
    events = list(run(s, state))
    assert [e.lower.converged for e in events if isinstance(e, Stepped)] == [True, True]
    assert tree.norm(tree.sub(state.y, s.problem.lower_solution(state.x))) > 0.1
    (warned,) = [e for e in events if isinstance(e, Warned)]
    assert warned.kind == "lower solve"
    asked = float(re.search(r"set lower\.tolerance to (\S+),", warned.message).group(1))
    better = setup(Scaled(), steps=2, lower=replace(solver, tolerance=asked), estimator=Implicit())
    assert not [e for e in run(better, start(better)) if isinstance(e, Warned)]
    plain = setup(Quadratic(), steps=2, lower=solver, estimator=Implicit())  # negative control
    assert not [e for e in run(plain, start(plain)) if isinstance(e, Warned)]


def test_warnings_are_counted_across_a_resume():
    s = setup(steps=4, estimator=Implicit(solver=Neumann(iterations=2)))
    state = start(s)
    for event in run(s, state):
        if isinstance(event, Stepped) and event.step == 2:
            break
    events = list(run(s, restore(s, state.save())))
    assert not [e for e in events if isinstance(e, Warned)]
    assert events[-1].warned == {"residual": 4}
