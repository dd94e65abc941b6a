"""Tasks in one batch: equal to a loop over them, whatever the estimator."""

import itertools
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.estimators.forward import Forward
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.penalty import Penalty
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.problem.over_tasks import OverTasks, at, stack
from bilevel.registry import build
from bilevel.rng import Streams, stream
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import check
from bilevel.types import LowerSolution
from bilevel_problems.sinusoid import Sinusoid
from tests.cases import assert_close, relative
from tests.problem.fits import Fit

TASKS = 4


@component
class Started(Fit):
    """The same, started at x, and y held in a box."""

    def lower_start(self, x, y):
        return {"y": x["x"].sin(), "offset": 0.5 * y["offset"]}

    def project_lower(self, y):
        return {"y": y["y"].clamp(-0.6, 0.6), "offset": y["offset"]}


def problem(kind=Fit, **options):
    return OverTasks(problem=kind(), num_tasks=TASKS, **options)


def scene(made):
    x, y = made.init(Streams(0))
    y = tree.map(lambda p: p + torch.randn(p.shape, generator=stream(1, "y")).to(p), y)
    return x, y, *next(made.episodes(stream(0, "batches")))


def ask(loss, x, y, lower, upper, estimator, steps=None, restart=None):
    solved = None
    if steps:
        solver = Gradient(steps=steps, optimizer=SGD(lr=0.2))
        start = restart or y
        solved = solve_lower(loss.lower_loss, x, start, solver=solver, batch=lower, record=True)
    return hypergradient(
        loss.upper_loss,
        loss.lower_loss,
        x,
        LowerSolution(solved.y if solved else y, path=solved.path if solved else None),
        estimator=estimator,
        upper_batch=upper,
        lower_batch=lower,
    )


ESTIMATORS = [
    (Implicit(solver=CG(iterations=200, tolerance=1e-14)), None),
    (Unroll(), 5),
    (Unroll(memory="recompute"), 5),
    (Unroll(last=2), 5),
    (Forward(), 3),
    (OneStep(), None),
]


@pytest.mark.untrusted("few lower steps, whatever they come to")
@pytest.mark.parametrize(("estimator", "steps"), ESTIMATORS, ids=repr)
def test_equals_a_loop_over_the_tasks(estimator, steps):
    """Every task on its own, with no trace of the wrapper; the mean of their hypergradients."""
    made = problem()
    x, y, lower, upper = scene(made)
    got = ask(made, x, y, lower, upper, estimator, steps)
    alone = [
        ask(Fit(), x, at(y, i), at(lower, i), at(upper, i), estimator, steps).hypergradient
        for i in range(TASKS)
    ]
    mean = tree.map(lambda p: p.mean(0), stack(alone))
    assert_close(got.hypergradient, mean, rtol=1e-12)
    # negative control: a sum is not a mean, and one task is not all of them
    assert relative(tree.scale(TASKS, mean), mean) > 1
    assert relative(alone[0], mean) > 1e-2


@pytest.mark.parametrize(
    "estimator", [Penalty(lower=Gradient(steps=3)), OneStep(finite_difference=True)], ids=repr
)
def test_first_order_methods_too(estimator):
    """Their difference quotients are taken jointly, so the wrapper with a loop is the comparison."""
    one, other = (
        ask(made, *scene(made), estimator).hypergradient
        for made in (problem(), problem(batched=False))
    )
    assert_close(one, other, rtol=1e-10)


def test_a_start_that_depends_on_x_is_batched_too():
    made = problem(Started)
    x, y, lower, upper = scene(made)
    got = ask(made, x, y, lower, upper, Unroll(), 4, lambda x: made.lower_start(x, y))
    alone = []
    for i in range(TASKS):
        data = at(y, i), at(lower, i), at(upper, i)

        def restart(x, y=data[0]):
            return Started().lower_start(x, y)

        alone.append(ask(Started(), x, *data, Unroll(), 4, restart).hypergradient)
    assert_close(got.hypergradient, tree.map(lambda p: p.mean(0), stack(alone)), rtol=1e-12)


def test_lower_steps_are_those_a_task_takes_alone():
    made = problem()
    x, y, lower, _ = scene(made)
    solver = Gradient(steps=6, optimizer=Adam(lr=0.1))
    together = solve_lower(made.lower_loss, x, y, solver=solver, batch=lower).y
    for i in range(TASKS):
        alone = solve_lower(Fit().lower_loss, x, at(y, i), solver=solver, batch=at(lower, i)).y
        assert_close(at(together, i), alone, rtol=1e-12)


@pytest.mark.parametrize("batched", [True, False])
def test_a_run_gives_all_lower_steps_the_tasks_of_the_upper_batch(batched):
    seen = []

    class Noting(OverTasks):
        def _each(self, function, x, y, batch):
            seen.append((function.__name__, batch))
            return super()._each(function, x, y, batch)

    made = Noting(problem=Started(), num_tasks=TASKS, batched=batched)
    setup = _setup(made)
    state = engine.start(setup)
    expected = made.episodes(stream(setup.seed, "episodes"))
    for event in engine.run(setup, state):
        if not isinstance(event, Stepped):
            seen.clear()
            continue
        lower, upper = next(expected)
        assert {name for name, _ in seen} == {"lower_loss", "upper_loss"}
        for name, batch in seen:
            whole = lower if name == "lower_loss" else {"a": upper[0], "b": upper[1]}
            given = batch if name == "lower_loss" else {"a": batch[0], "b": batch[1]}
            assert_close(given, whole, rtol=0)
        seen.clear()
    assert state.step == 3


def _setup(made, estimator=None, steps=3):
    return Setup(
        made,
        Gradient(steps=4, optimizer=SGD(lr=0.2)),
        Upper(steps=steps, optimizer=SGD(lr=0.1)),
        estimator or Unroll(),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("fresh", [True, False])
def test_a_resumed_run_draws_the_tasks_that_come_next(fresh):
    setup = _setup(problem(Started, fresh=fresh))
    whole = engine.start(setup)
    list(engine.run(setup, whole))
    state = engine.start(setup)
    for event in engine.run(setup, state):
        if isinstance(event, Stepped) and event.step == 2:
            break
    again = engine.restore(setup, state.save())
    list(engine.run(setup, again))
    assert torch.equal(again.x["x"], whole.x["x"])
    assert torch.equal(again.y["y"], whole.y["y"])


def test_fixed_tasks_are_the_same_for_ever():
    one = list(itertools.islice(problem(fresh=False).episodes(stream(0, "b")), 3))
    many = list(itertools.islice(problem().episodes(stream(0, "b")), 3))
    assert torch.equal(one[0][0]["a"], one[2][0]["a"])
    assert torch.equal(one[0][0]["a"], many[0][0]["a"])
    assert not torch.equal(many[0][0]["a"], many[2][0]["a"])


def test_projection_and_measures_are_taken_task_by_task():
    made = problem(Started)
    _, y, *_ = scene(made)
    held = made.project_lower(y)
    assert torch.equal(held["y"], y["y"].clamp(-0.6, 0.6))
    assert made.evaluate({}, y)["first"] == pytest.approx(float(y["y"][:, 0].mean()), rel=1e-12)
    assert not hasattr(problem(), "project_lower")
    assert not hasattr(problem(), "lower_start")
    assert not hasattr(made, "lower_solution")


def test_check_knows_a_batch_of_tasks():
    rows = check(_setup(problem()), {"implicit": Implicit(), "unroll": Unroll()})
    assert [row.verdict for row in rows] == ["exact", "as claimed"]


def test_lbfgs_takes_the_strided_gradients_of_a_batch():
    """vmap hands out gradients that are not contiguous; torch's L-BFGS views them as vectors."""
    made = OverTasks(problem=Sinusoid(width=3), num_tasks=TASKS)
    x, y = made.init(Streams(0))
    lower, _ = next(made.episodes(stream(0, "b")))
    found = [
        solve_lower(one.lower_loss, x, y, solver=LBFGS(steps=5), batch=lower).y
        for one in (made, replace(made, batched=False))
    ]
    assert relative(found[0], found[1]) < 1e-3


def test_a_problem_without_tasks_is_refused():
    from bilevel.errors import RecipeError

    with pytest.raises(RecipeError, match="Quadratic has no tasks: give it `episodes"):
        build.build("problems", {"name": "over_tasks", "problem": "quadratic"})


@component
class Branching(Fit):
    """A loss whose control flow looks at values."""

    def lower_loss(self, x, y, batch):
        if y["offset"] > 0:
            return y["offset"] + y["y"].square().sum()
        return Fit.lower_loss(self, x, y, batch)


def test_a_loss_that_vmap_cannot_batch_is_named_with_its_remedy():
    made = OverTasks(problem=Branching(), num_tasks=TASKS)
    x, y, lower, _ = scene(made)
    with pytest.raises(ProblemError, match=r"lower_loss of Branching .*batched=False"):
        made.lower_loss(x, y, lower)
    looped = OverTasks(problem=Branching(), num_tasks=TASKS, batched=False)
    assert torch.isfinite(looped.lower_loss(x, y, lower))


@component
class Normalised(Fit):
    """Batch normalisation that keeps running statistics."""

    def lower_loss(self, x, y, batch):
        stats = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        a = torch.nn.functional.batch_norm(batch["a"], *stats, training=True)
        return Fit.lower_loss(self, x, y, {"a": a, "b": batch["b"]})


def test_impure_losses_are_still_refused():
    made = OverTasks(problem=Normalised(), num_tasks=TASKS)
    x, y, lower, upper = scene(made)
    with pytest.raises(ProblemError, match="BatchNorm"):
        ask(made, x, y, lower, upper, Implicit())


def test_a_batch_that_is_no_tensor_is_named():
    assert stack([None, None]) is None
    pair = stack([(torch.ones(2), [torch.zeros(1)])] * 3)
    assert pair[0].shape == (3, 2)
    assert at(pair, 1)[1][0].shape == (1,)
    with pytest.raises(ProblemError, match="holds str"):
        stack([{"a": "x"}, {"a": "y"}])
