"""Methods that move x and y together: what they claim, where they rest, what they keep."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.errors import ProblemError
from bilevel.estimators.aggregation import Aggregation
from bilevel.estimators.bome import Bome
from bilevel.estimators.gradient_gap import GradientGap
from bilevel.estimators.joint import Joint
from bilevel.estimators.moreau import Moreau
from bilevel.estimators.regularised_gap import RegularisedGap
from bilevel.estimators.sama import Sama
from bilevel.estimators.value_function import ValueFunction
from bilevel.estimators.value_gap import ValueGap
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.optimizers.differentiable import SGD, Adam
from bilevel.types import LowerSolution, Path
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative
from tests.estimators.shared import OnceOnly
from tests.estimators.typed_out import STEP, against_differences, resting, run, solution, steps

CLAIMING = [
    ValueGap(),
    Bome(barrier=30.0),
    GradientGap(),
    Moreau(),
    RegularisedGap(),
    Joint(),
    ValueFunction(),
    Aggregation(),
    Sama(),
]


@pytest.mark.parametrize("make", [PROBLEMS[0], PROBLEMS[3]], ids=[NAMES[0], NAMES[3]])
@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_each_is_the_gradient_of_what_it_claims(estimator, make):
    error, rounding = against_differences(estimator, lambda e: e, make)
    assert error <= max(1e-8, 10 * rounding)


@pytest.mark.parametrize(
    ("estimator", "wrong"),
    [
        (ValueGap(), {"strength": 10.1}),
        (Bome(barrier=30.0), {"barrier": 30.3}),
        (GradientGap(), {"strength": 10.1}),
        (Moreau(), {"gamma": 1.01}),
        (Joint(), {"weight": 1.01}),
        (ValueFunction(), {"sigma": 1.1e-2}),
        (Aggregation(), {"alpha": 0.51}),
    ],
    ids=lambda e: type(e).__name__,
)
def test_and_not_of_something_near_it(estimator, wrong):
    error, rounding = against_differences(estimator, lambda e: replace(e, **wrong), PROBLEMS[0])
    assert error > 1e-4 > 10 * rounding


@pytest.mark.parametrize(
    "make",
    [
        lambda s: ValueGap(strength=s, optimizer=STEP, lower=Newton(tolerance=1e-13)),
        lambda s: Moreau(strength=s, optimizer=STEP, lower=Newton(tolerance=1e-13)),
        lambda s: GradientGap(strength=s, optimizer=STEP),
    ],
    ids=["value gap", "Moreau", "gradient gap"],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_resting_point_is_off_by_one_over_the_strength(make, seed):
    case = closed_form(PROBLEMS[0], seed)
    best = solution(case.problem)
    errors = [relative(resting(make(s), case)[0], best) for s in (1e3, 1e4)]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)
    assert errors[1] < 0.05


FIRST_ORDER = [ValueGap(), Bome(), Moreau(), RegularisedGap(), Joint(), ValueFunction(), Sama()]
SECOND_ORDER = [GradientGap(), Aggregation()]


@pytest.mark.parametrize("estimator", FIRST_ORDER + SECOND_ORDER, ids=lambda e: type(e).__name__)
def test_first_order_methods_take_no_second_derivative(estimator):
    def lower(x, y, batch):
        return OnceOnly.apply(y["y"] - x["x"]).sum()

    def upper(x, y, batch):
        return OnceOnly.apply(y["y"] + x["x"]).sum()

    x, y = {"x": torch.ones(2)}, {"y": torch.zeros(2)}
    path = Path(SGD(), y, {}, (None,))
    assert estimator.needs.second_order is (estimator in SECOND_ORDER)
    if estimator in FIRST_ORDER:
        got = hypergradient(upper, lower, x, LowerSolution(y, path=path), estimator=estimator)
        assert (got.stats.hvps, got.stats.cross_products) == (0, 0)
    else:
        with pytest.raises(ProblemError, match="once_differentiable"):
            hypergradient(upper, lower, x, LowerSolution(y, path=path), estimator=estimator)


@pytest.mark.parametrize(
    "estimator",
    [
        ValueGap(strength=10.0, optimizer=SGD(lr=0.5), lower=steps(3, 1.0)),
        Moreau(strength=10.0, gamma=10.0, optimizer=SGD(lr=0.5), lower=steps(1, 0.9)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_run_comes_to_rest_where_its_penalty_says(estimator):
    """One step of everything at a time, from where the problem starts."""
    problem, state = run(estimator, 1500, 2e-2)
    exact = replace(estimator, lower=Newton(tolerance=1e-13), optimizer=STEP)
    case = replace(closed_form(PROBLEMS[0], 0), problem=problem)
    x, y = resting(exact, case)
    assert_close(state.x, x, rtol=1e-3)
    assert_close(state.y, y, rtol=1e-3)
    assert relative(state.x, solution(problem)) > 1e-2  # which is not x*


class Batches(Quadratic):
    """A lower batch that says which it is."""

    def lower_batches(self, stream):
        for index in itertools.count():
            yield self.constants | {"index": index}

    def lower_loss(self, x, y, batch):
        SEEN.append(int(batch["index"]))
        return super().lower_loss(x, y, batch)


SEEN: list[int] = []


@pytest.mark.parametrize(
    ("estimator", "fresh"),
    [
        (ValueGap(lower=steps(3, 0.1)), 3),
        (Bome(lower=steps(3, 0.1)), 3),
        (Moreau(lower=steps(2, 0.1)), 2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_inner_steps_draw_their_own_batches(estimator, fresh):
    SEEN.clear()
    run(estimator, 2, 1e-3, Batches())
    assert max(SEEN) == 2 * (1 + fresh) - 1


@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_a_state_is_never_written_to(estimator):
    case = closed_form(PROBLEMS[0], 0)
    path = case.record(2, 0.1, case.y).path
    first = case.estimate(estimator, LowerSolution(offset(case.y, 1.0), path=path))
    kept = copy.deepcopy(first.state)
    second = case.estimate(
        estimator, LowerSolution(offset(case.y, 1.0), path=path), state=first.state
    )
    again = case.estimate(estimator, LowerSolution(offset(case.y, 1.0), path=path), state=kept)
    assert torch.equal(second.hypergradient["x"], again.hypergradient["x"])
    assert str(first.state) == str(kept)


@pytest.mark.parametrize("name", ["ValueGap", "Bome", "Moreau", "ValueFunction"])
def test_an_unsolved_side_problem_is_flagged(name):
    case = closed_form(PROBLEMS[0], 0)
    make = {type(e).__name__: type(e) for e in CLAIMING}[name]
    start = offset(case.y, 1.0)
    # values of some 1e3 say nothing of gradients below √(eps · 1e3 · curvature), 1e-5 under P
    for count, solved in ((1, False), (200, True)):
        got = case.estimate(make(lower=LBFGS(steps=count, tolerance=1e-4)), start)
        assert got.stats.converged is solved
    assert case.estimate(make(lower=steps(2, 1e-3)), start).stats.converged is None


@pytest.mark.parametrize("estimator", CLAIMING, ids=lambda e: type(e).__name__)
def test_single_precision_is_kept(estimator):
    case = closed_form(PROBLEMS[0], 0)

    def single(params):
        return tree.to(params, "cpu", torch.float32)

    y = single(offset(case.y, 1.0))
    got = hypergradient(
        case.problem.upper_loss,
        case.problem.lower_loss,
        single(case.x),
        LowerSolution(y, path=Path(Adam(), y, Adam().init(y), (single(case.lower_batch),))),
        estimator=estimator,
        upper_batch=single(case.upper_batch),
        lower_batch=single(case.lower_batch),
    )
    assert got.hypergradient["x"].dtype == torch.float32
    assert got.moved is None or got.moved.y["y"].dtype == torch.float32


@pytest.mark.parametrize("estimator", [ValueGap(), ValueFunction(), Moreau()], ids=repr)
def test_products_of_a_side_problem_are_those_of_each_loss_in_it(here, estimator):
    """Newton takes dim(y) products with the Hessian of what it minimises: of G, or of F and G."""
    case, start, _ = here
    dim = tree.size(start)
    got = case.estimate(replace(estimator, lower=Newton(steps=2, tolerance=0.0)), start)
    solved = {"ValueGap": 1, "Moreau": 1, "ValueFunction": 1 + 2}[type(estimator).__name__]
    assert got.stats.hvps == solved * 2 * dim
