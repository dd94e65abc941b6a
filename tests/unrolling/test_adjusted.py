"""Lower steps that are clipped, scheduled, of mean gradients, or left out: taken and differentiated exactly."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, solve_lower
from bilevel.errors import ConvergenceError, ProblemError, RecipeError
from bilevel.estimators import Forward, Implicit, Sama, Unroll
from bilevel.events import Stepped, Warned
from bilevel.linear import CG
from bilevel.lower import Gradient
from bilevel.optimizers import SGD, Adam, AdamW, Clip, Learned, Schedule, TorchOptimizer
from bilevel.optimizers.adjusted import Adjusted
from bilevel.recipe import loads
from bilevel.run.engine import refuse_mismatch, restore, run, start
from bilevel.run.upper import Upper
from bilevel.types import Several
from bilevel.unrolling.path import advance
from tests.run.setups import Noisy, frozen, same, setup

F64 = torch.float64
K = 5
STREAM = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(4, 3, generator=STREAM, dtype=F64) for _ in range(3 * K)]
TARGETS = torch.randn(4, generator=STREAM, dtype=F64)
Y = {"w": torch.tensor([0.5, -1.5, 0.8], dtype=F64), "b": torch.tensor(0.3, dtype=F64)}
X = {"decay": torch.tensor([-1.0, -0.5, 0.2], dtype=F64), "lr": torch.tensor(-1.0, dtype=F64)}
COSINE = Schedule(name="CosineAnnealingLR", options={"T_max": 7, "eta_min": 0.02})


def lower(x, y, batch):
    residual = (batch @ y["w"] + y["b"]).tanh() - TARGETS
    return 3 * residual.square().sum() + (x["decay"].exp() * y["w"].square()).sum()


def upper(x, y, batch):
    return (
        (BATCHES[0] @ y["w"] + 2 * y["b"] - 1).square().sum() + 0.1 * x["decay"].sum() + 0 * x["lr"]
    )


def by_hand(x, solver):
    """F(x, y_K(x)) in torch alone, for SGD without momentum: clipped, scheduled, of mean gradients."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=solver.optimizer.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, **COSINE.options)
    y, draws = {name: entry.clone().requires_grad_() for name, entry in Y.items()}, iter(BATCHES)
    for _ in range(K):
        G = sum(lower(x, y, next(draws)) for _ in range(solver.accumulate)) / solver.accumulate
        g = torch.autograd.grad(G, list(y.values()), create_graph=True)
        if solver.clip and solver.clip.value:
            g = [entry.clamp(-solver.clip.value, solver.clip.value) for entry in g]
        if solver.clip and solver.clip.norm:
            norm = torch.cat([entry.reshape(-1) for entry in g]).norm()
            g = [entry * (solver.clip.norm / norm).clamp(max=1.0) for entry in g]
        rate = optimizer.param_groups[0]["lr"]
        y = {name: entry - rate * d for (name, entry), d in zip(y.items(), g, strict=True)}
        if solver.schedule:
            optimizer.step()
            scheduler.step()
    return upper(x, y, None)


SOLVERS = {
    "clip norm": Gradient(steps=K, optimizer=SGD(lr=0.1), clip=Clip(norm=2.0)),
    "clip value": Gradient(steps=K, optimizer=SGD(lr=0.1), clip=Clip(value=1.5)),
    "clip both": Gradient(steps=K, optimizer=SGD(lr=0.1), clip=Clip(value=1.5, norm=2.0)),
    "schedule": Gradient(steps=K, optimizer=SGD(lr=0.1), schedule=COSINE),
    "accumulate": Gradient(steps=K, optimizer=SGD(lr=0.1), accumulate=3),
    "all": Gradient(
        steps=K, optimizer=SGD(lr=0.1), clip=Clip(norm=2.0), schedule=COSINE, accumulate=3
    ),
}
MEMORY = ("store", "recompute", "checkpoint", "traced", "mixed")


def solved(solver, x=X):
    return solve_lower(lower, x, Y, solver=solver, batches=BATCHES, record=True)


def got(solver, estimator):
    return hypergradient(upper, lower, X, solved(solver), estimator=estimator).hypergradient


@pytest.mark.parametrize("name", SOLVERS)
def test_the_hypergradient_is_that_of_the_steps_taken(name):
    solver = SOLVERS[name]
    decay = X["decay"].clone().requires_grad_()
    value = by_hand({**X, "decay": decay}, solver)
    (truth,) = torch.autograd.grad(value, decay)
    taken = solved(solver)
    torch.testing.assert_close(upper(X, taken.y, None), value.detach(), rtol=1e-12, atol=0)
    assert taken.stats.gradients == K * solver.accumulate
    for memory in MEMORY:
        found = got(solver, Unroll(memory=memory))["decay"]
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12, msg=memory)
    forward = got(solver, Forward())["decay"]
    torch.testing.assert_close(forward, truth, rtol=1e-10, atol=1e-12)
    # negative control: the derivative of plain steps is another
    plain = got(Gradient(steps=K, optimizer=SGD(lr=0.1)), Unroll())["decay"]
    assert not torch.allclose(plain, truth, rtol=1e-2)


RULES = {
    "adam": Adam(lr=0.2),
    "adamw": AdamW(lr=0.2, weight_decay=0.3),
    "momentum": SGD(lr=0.05, momentum=0.9),
    "learned": SGD(lr=Learned(upper="lr", transform="exp"), momentum=0.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_against_finite_differences(rule):
    """For optimizers with a state, and a learned rate; the schedule has been entered before."""
    solver = Gradient(
        steps=K, optimizer=RULES[rule], clip=Clip(norm=2.0), schedule=COSINE, accumulate=2
    )
    begun = solve_lower(lower, X, Y, solver=solver, batches=BATCHES)

    def recorded(x):
        return solve_lower(
            lower, x, begun.y, solver=solver, batches=BATCHES, state=begun.state, record=True
        )

    solution = recorded(X)
    found = {}
    for memory in MEMORY:
        found[memory] = hypergradient(
            upper, lower, X, solution, estimator=Unroll(memory=memory)
        ).hypergradient
    for name, entry in X.items():
        for i in range(entry.numel()):
            ends = []
            for sign in (1, -1):
                moved = entry.clone().reshape(-1)
                moved[i] += sign * 1e-5
                x = {**X, name: moved.reshape(entry.shape)}
                ends.append(float(upper(x, recorded(x).y, None)))
            slope = (ends[0] - ends[1]) / 2e-5
            for memory in MEMORY:
                value = float(found[memory][name].reshape(-1)[i])
                assert value == pytest.approx(slope, rel=1e-6, abs=1e-8), memory


def test_a_schedule_goes_on_from_solve_to_solve():
    """Two solves of K steps are one of 2 K, in what state there is; over a solve they are not."""
    scheduled = Gradient(steps=K, optimizer=Adam(lr=0.2), schedule=COSINE)
    whole = solve_lower(lower, X, Y, solver=replace(scheduled, steps=2 * K), batches=BATCHES)
    y, state, draws = Y, None, itertools.cycle(BATCHES)
    for _ in range(2):
        part = solve_lower(lower, X, y, solver=scheduled, batches=draws, state=state)
        y, state = part.y, part.state
        draws = itertools.chain(BATCHES[K:], draws)
    assert all(torch.equal(whole.y[name], y[name]) for name in y)
    assert float(state["schedule"]["before"] + state["schedule"]["taken"]) == 2 * K

    again = replace(scheduled, schedule_over="solve")
    first = solve_lower(lower, X, Y, solver=again, batches=BATCHES)
    second = solve_lower(lower, X, Y, solver=again, batches=BATCHES, state=first.state)
    for found in (first, second):
        assert found.state["schedule"]["rates"].tolist() == COSINE.rates(0, K, 0.2)
    assert state["schedule"]["rates"].tolist() == COSINE.rates(K, 2 * K, 0.2)


def test_a_part_of_a_path_begins_where_it_is_in_the_schedule():
    solver = SOLVERS["schedule"]
    full = solved(solver)
    last = solve_lower(lower, X, Y, solver=solver, batches=BATCHES, record=2)
    assert last.path.dropped == K - 2
    loss = setup(Noisy()).levels.losses().lower
    end = advance(last.path, replace(loss, function=lower), X, 2).start
    assert all(torch.equal(end[name], full.y[name]) for name in end)


def test_steps_along_from_a_solution_follow_the_schedule():
    """`along` takes its own steps, of one batch; by hand from the same start."""
    solver = replace(SOLVERS["all"], accumulate=1)
    found = hypergradient(
        upper, lower, X, Y, estimator=Unroll(along=solver), lower_batch=BATCHES[0]
    ).hypergradient
    recorded = solve_lower(lower, X, Y, solver=solver, batch=BATCHES[0], record=True)
    other = hypergradient(upper, lower, X, recorded, estimator=Unroll()).hypergradient
    assert torch.equal(found["decay"], other["decay"])


def test_sama_differentiates_the_clipped_update():
    solver = Gradient(steps=1, optimizer=SGD(lr=0.1), clip=Clip(norm=2.0))
    clipped, plain = (
        hypergradient(upper, lower, X, solved(s), estimator=Sama()).hypergradient["decay"]
        for s in (solver, replace(solver, clip=None))
    )
    assert not torch.allclose(clipped, plain, rtol=1e-2)


@pytest.mark.parametrize("name", ["clip norm", "schedule"])
def test_reversible_is_refused_by_name(name):
    solver = replace(SOLVERS[name], optimizer=SGD(lr=0.1, momentum=0.9))
    with pytest.raises(ProblemError, match=r"clipped or follow a schedule.*recompute"):
        got(solver, Unroll(memory="reversible"))
    got(replace(solver, clip=None, schedule=None), Unroll(memory="reversible"))


def test_reversible_takes_mean_gradients():
    solver = Gradient(steps=K, optimizer=SGD(lr=0.05, momentum=0.9), accumulate=3)
    found, truth = (got(solver, Unroll(memory=m))["decay"] for m in ("reversible", "store"))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def test_implicit_differentiates_at_the_mean_of_the_last_batches():
    solver = Gradient(steps=800, optimizer=SGD(lr=0.02), accumulate=2)
    pair = BATCHES[:2]
    solution = solve_lower(lower, X, Y, solver=solver, batches=itertools.cycle(pair))
    assert isinstance(solution.batch, Several)
    found = hypergradient(upper, lower, X, solution, estimator=Implicit(solver=CG(tolerance=1e-12)))

    def mean(x, y, batch):
        return (lower(x, y, pair[0]) + lower(x, y, pair[1])) / 2

    truth = hypergradient(
        upper, mean, X, solution.y, estimator=Implicit(solver=CG(tolerance=1e-12))
    )
    for h in (found, truth):
        assert not h.hypergradient["lr"].any()
    a, b = found.hypergradient["decay"], truth.hypergradient["decay"]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(ProblemError, match=r"one batch: set lower.accumulate to 1"):
        _ = replace(setup(Noisy()).levels.losses().lower, batch=solution.batch).one_batch


def test_a_torch_optimizer_below_follows_too():
    """Not differentiable: its rate is a number."""
    rule = Adjusted(TorchOptimizer(optimizer="SGD", options={"lr": 0.1}), Clip(norm=2.0), COSINE)
    assert not rule.differentiable
    solver = replace(SOLVERS["all"], optimizer=rule.wrapped)
    y = solve_lower(lower, X, Y, solver=solver, batches=BATCHES).y
    same_steps = solved(SOLVERS["all"]).y
    for name in y:
        torch.testing.assert_close(y[name], same_steps[name], rtol=1e-12, atol=0)


BAD = [BATCHES[0], torch.full((4, 3), math.nan, dtype=F64), *BATCHES[1:3]]


@pytest.mark.parametrize("memory", MEMORY)
def test_a_lower_step_that_is_skipped_is_no_part_of_the_path(memory):
    solver = Gradient(steps=4, optimizer=SGD(lr=0.1, momentum=0.5), nonfinite="skip")
    solution = solve_lower(lower, X, Y, solver=solver, batches=BAD, record=True)
    assert (solution.stats.steps, solution.stats.skipped, solution.stats.gradients) == (3, 1, 4)
    clean = solve_lower(
        lower, X, Y, solver=replace(solver, steps=3), batches=[BAD[0], *BAD[2:]], record=True
    )
    assert all(torch.equal(solution.y[name], clean.y[name]) for name in Y)
    found, truth = (
        hypergradient(upper, lower, X, s, estimator=Unroll(memory=memory)).hypergradient
        for s in (solution, clean)
    )
    assert torch.equal(found["decay"], truth["decay"])


def test_a_solve_that_skips_all_its_steps_fails():
    bad = itertools.repeat(BAD[1])
    for policy in ("halt", "skip"):
        solver = Gradient(steps=3, nonfinite=policy)
        with pytest.raises(ConvergenceError, match="lower_loss = nan"):
            solver.solve(
                replace(setup(Noisy()).levels.losses().lower, function=lower),
                X,
                Y,
                batches=bad,
                state=solver.init(Y),
            )
    last = [BATCHES[0], BAD[1]]
    solution = solve_lower(lower, X, Y, solver=Gradient(steps=2, nonfinite="skip"), batches=last)
    assert solution.batch is BATCHES[0]  # where a derivative can be taken


class Gaps(Noisy):
    """Some lower batches are no numbers."""

    def lower_batches(self, generator):
        for batch in super().lower_batches(generator):
            yield torch.where(batch.sum() > 5, math.nan, batch)


ALL = Gradient(
    steps=4,
    optimizer=Adam(lr=0.05),
    clip=Clip(norm=1.0),
    schedule=Schedule(
        name="CyclicLR",
        options={"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "cycle_momentum": False},
    ),
    accumulate=2,
    nonfinite="skip",
)


@pytest.mark.parametrize(
    "estimator", [Unroll(), Unroll(last=2, memory="traced"), Implicit()], ids=repr
)
def test_resuming_is_bit_identical(estimator):
    s = setup(Gaps(), estimator, lower=ALL)
    whole = start(s)
    events = list(run(s, whole))
    log = [e for e in events if isinstance(e, Stepped)]
    (said,) = (e.message for e in events if isinstance(e, Warned) and e.kind == "lower steps")
    first = next(e.lower.skipped for e in log if e.lower.skipped)
    assert said.startswith(f"{first} of the lower steps were left out, since G or its gradient")
    assert whole.warned["lower steps"] == sum(e.lower.skipped > 0 for e in log)
    for stop in (1, 3, 5):
        first = start(s)
        for event in run(s, first):
            if isinstance(event, Stepped) and event.step == stop:
                break
        again = restore(s, frozen(first.save()))
        rest = [e for e in run(s, again) if isinstance(e, Stepped)]
        assert same(again.save(), whole.save())
        assert [e.upper_loss for e in rest] == [e.upper_loss for e in log[stop:]]


def test_a_run_with_the_kept_graph_is_the_run_that_recomputes():
    norms = []
    for memory in ("store", "recompute"):
        s = setup(Gaps(), Unroll(memory=memory), lower=ALL)
        norms.append([e.hypergradient_norm for e in run(s, start(s)) if isinstance(e, Stepped)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_from_a_recipe():
    text = """
problem: quadratic
lower:
  schedule: {name: StepLR, options: {step_size: 5}}
  clip: {norm: 1.0}
  accumulate: 2
  nonfinite: skip
"""
    recipe = loads(text)
    assert recipe.lower == Gradient(
        schedule=Schedule(name="StepLR", options={"step_size": 5}),
        clip=Clip(norm=1.0),
        accumulate=2,
        nonfinite="skip",
    )
    assert loads(recipe.dump()) == recipe
    with pytest.raises(RecipeError, match=r"lower.nonfinite = 'halve'; must be 'halt' or 'skip'"):
        loads(text, ["lower.nonfinite=halve"])


def test_a_lower_schedule_that_ends_too_early_is_refused():
    ends = Schedule(
        name="OneCycleLR", options={"max_lr": 0.1, "total_steps": 20, "cycle_momentum": False}
    )
    s = replace(setup(Noisy(), lower=Gradient(steps=5, schedule=ends)), upper=Upper(steps=6))
    with pytest.raises(ProblemError, match=r"lower.schedule: .*no rate for step 22.*6 upper steps"):
        refuse_mismatch(s)
    refuse_mismatch(replace(s, upper=Upper(steps=4)))
    refuse_mismatch(replace(s, lower=replace(s.lower, schedule_over="solve")))
