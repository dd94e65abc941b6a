"""Adaptive accuracy: what it certifies is true, and it costs fewer products than a fixed one."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.estimators.maid import MAID, _Found
from bilevel.events import Stepped
from bilevel.linear.dense import Dense
from bilevel.lower.gradient import Gradient
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.testing import check_estimator
from bilevel.types import Point, Stats
from bilevel_problems.quadratic import Quadratic
from tests.cases import assert_close, closed_form, offset, relative

FIXED = {accuracy: MAID(accuracy=accuracy, accuracy_growth=1.0) for accuracy in (1e-4, 1e-6, 1e-8)}


def value(problem, x):
    """Φ(x) in closed form."""
    return float(problem.upper_loss(x, problem.lower_solution(x), problem.constants))


def trace(problem, estimator, steps=20):
    """(x, Φ, HVPs so far, event) before the first step and after each."""
    made = Setup(problem, Gradient(), Upper(steps=steps), estimator, dtype=torch.float64)
    state = engine.start(made)
    rows = [(state.x, value(problem, state.x), 0, None)]
    for event in engine.run(made, state):
        if isinstance(event, Stepped):
            rows.append((state.x, value(problem, state.x), state.totals.hvps, event))
    return rows


def test_it_keeps_its_claim_and_the_contract():
    check_estimator(MAID(), seeds=(0,))


@pytest.mark.parametrize("seed", range(3))
def test_descent_is_certified_and_the_bound_holds(seed):
    problem = Quadratic(data_seed=seed)
    k = problem.constants
    inverse = torch.linalg.inv(k["A"])
    # h(y) − dΦ/dx = (Dᵀ + Bᵀ A⁻¹) (y − y*): its largest slope in y
    slope = float(torch.linalg.matrix_norm(k["D"].T + k["B"].T @ inverse, 2))
    rows = trace(problem, MAID(sensitivity=slope))
    for (x, before, _, _), (after_x, after, _, event) in itertools.pairwise(rows):
        assert event.estimate.error_bound_from == "estimated"
        h = event.hypergradient_norm
        step = float((after_x["x"] - x["x"]).norm()) / h
        assert step > 0
        assert before - after >= 0.1 * step * h**2 * (1 - 1e-9)
        truth = float(problem.hypergradient(x)["x"].norm())
        assert abs(h - truth) <= event.estimate.error_bound <= 0.9 * h


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_within_its_bound_from_any_start(seed):
    case = closed_form(lambda s: Quadratic(data_seed=s), seed)
    k = case.problem.constants
    inverse = torch.linalg.inv(k["A"])
    slope = float(torch.linalg.matrix_norm(k["D"].T + k["B"].T @ inverse, 2))
    for accuracy in (0.1, 1e-3):
        got = case.estimate(
            MAID(accuracy=accuracy, sensitivity=slope, strong_convexity=0.1),
            offset(case.y, 5.0, seed),
        )
        error = tree.norm(tree.sub(got.hypergradient, case.truth))
        assert 0 < error <= got.stats.error_bound


def known(k):
    """The constants of a quadratic problem: of A, of B, of h in y, and of ∇y F."""
    inverse = torch.linalg.inv(k["A"])
    return {
        "strong_convexity": float(torch.linalg.eigvalsh(k["A"])[0]) * (1 - 1e-12),
        "cross_norm": float(torch.linalg.matrix_norm(k["B"], 2)),
        "sensitivity": float(torch.linalg.matrix_norm(k["D"].T + k["B"].T @ inverse, 2)),
        "upper_smoothness": 1.0,
    }


@pytest.mark.parametrize("accuracy", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_with_known_constants_the_error_is_within_its_bound(seed, accuracy):
    case = closed_form(lambda s: Quadratic(data_seed=s), seed)
    got = case.estimate(
        MAID(accuracy=accuracy, **known(case.problem.constants)), offset(case.y, 5.0, seed)
    )
    assert got.stats.error_bound_from == "known constants"
    assert 0 < tree.norm(tree.sub(got.hypergradient, case.truth)) <= got.stats.error_bound


def test_with_estimated_constants_it_need_not_be():
    """Negative control, and why the page promises nothing there."""
    case = closed_form(lambda s: Quadratic(data_seed=s), 0)
    constants = known(case.problem.constants)
    ratios = []
    for given in (
        {},
        {"sensitivity": constants["sensitivity"]},
        {"strong_convexity": constants["strong_convexity"]},
    ):
        got = case.estimate(MAID(**given), offset(case.y, 5.0))
        assert got.stats.error_bound_from == "estimated"
        off = tree.norm(tree.sub(got.hypergradient, case.truth))
        ratios.append(off / got.stats.error_bound)
    assert ratios[0] > 1.5
    assert ratios[1] < ratios[0]


@pytest.mark.parametrize("seed", range(3))
def test_with_known_constants_every_step_lowers_the_value_as_it_says(seed):
    problem = Quadratic(data_seed=seed)
    rows = trace(problem, MAID(accuracy=1.0, **known(problem.constants)))
    for (x, before, _, _), (after_x, after, _, event) in itertools.pairwise(rows):
        h = event.hypergradient_norm
        step = float((after_x["x"] - x["x"]).norm()) / h
        assert before - after >= 0.1 * step * h**2 * (1 - 1e-9)
        assert event.estimate.error_bound <= 0.9 * h


def test_the_smoothness_of_F_is_in_the_doubt():
    """‖∇y F‖ e + S e² / 2: with S a million times larger y has to be a thousand times nearer."""
    case = closed_form(lambda s: Quadratic(data_seed=s), 0)
    constants = known(case.problem.constants)
    ends = []
    for S in (1.0, 1e6):
        got = case.estimate(MAID(**constants | {"upper_smoothness": S}), offset(case.y, 5.0))
        ends.append(got.state["accuracy"])
    assert ends[1] < 0.1 * ends[0]


class Walled(Quadratic):
    """F overflows outside a ball, as exp or float16 do."""

    def upper_loss(self, x, y, batch):
        inside = super().upper_loss(x, y, batch)
        return inside if x["x"].detach().norm() < 1e3 else inside * math.inf


def test_a_trial_step_that_overflows_is_halved():
    ends = []
    for problem in (Walled(), Quadratic()):
        case = closed_form(lambda s, problem=problem: problem, 0)
        got = case.estimate(MAID(step=64.0, backtracks=20), offset(case.y, 1.0))
        ends.append(got.step)
        there = tree.axpy(-64.0, got.hypergradient, case.x)
        finite = bool(problem.upper_loss(there, case.y, case.upper_batch).isfinite())
        assert finite is not isinstance(problem, Walled)
    assert ends[0] == ends[1] > 0


def test_a_step_that_is_not_searched_for_rises():
    """Negative control: the first step of length 1 along −h, with nothing to certify it."""
    problem = Quadratic()
    x, before, _, _ = trace(problem, MAID(), steps=1)[0]
    assert value(problem, tree.axpy(-1.0, problem.hypergradient(x), x)) > before


def test_fewer_products_than_at_a_fixed_accuracy():
    problem = Quadratic()
    runs = {None: trace(problem, MAID(), 40)}
    runs |= {accuracy: trace(problem, fixed, 40) for accuracy, fixed in FIXED.items()}
    start, ends = runs[None][0][1], [rows[-1][1] for rows in runs.values()]
    least = min(ends)
    assert ends[0] - least <= 2e-4 * (start - least), "no worse in the end"
    for fraction, saved in ((1e-1, 0.7), (1e-2, 0.7)):
        needed = {
            name: next(r[2] for r in rows if r[1] - least <= fraction * (start - least))
            for name, rows in runs.items()
        }
        for accuracy in FIXED:
            assert needed[None] < saved * needed[accuracy], (fraction, needed)


def test_the_accuracy_follows_what_is_needed():
    problem = Quadratic()
    at = []
    made = Setup(problem, Gradient(), Upper(steps=30), MAID(), dtype=torch.float64)
    state = engine.start(made)
    for event in engine.run(made, state):
        if isinstance(event, Stepped):
            at.append(state.estimator["accuracy"])
    assert at[0] == 0.1
    assert at[-1] < 1e-2
    assert any(b > a for a, b in itertools.pairwise(at)), "it loosens again"


def test_the_run_takes_the_step_and_no_other():
    case = closed_form(lambda seed: Quadratic(data_seed=seed), 0)
    estimator = MAID()
    got = case.estimate(estimator, offset(case.y, 3.0))
    assert got.step is not None
    assert got.step > 0
    assert got.moved is not None
    # y is where the accepted step ended: near y* of the new x, not of the old one
    there = case.problem.lower_solution(tree.axpy(-got.step, got.hypergradient, case.x))
    assert tree.norm(tree.sub(got.moved.y, there)) <= 0.1 / 0.1 + 1e-9
    assert tree.norm(tree.sub(got.moved.y, there)) < tree.norm(tree.sub(got.moved.y, case.y))


def test_as_fine_as_it_goes_it_is_exact():
    case = closed_form(lambda seed: Quadratic(data_seed=seed), 1)
    got = case.estimate(MAID().tight(10), offset(case.y, 3.0))
    assert_close(got.hypergradient, case.truth, rtol=1e-8)
    coarse = case.estimate(MAID(), offset(case.y, 3.0))
    assert relative(coarse.hypergradient, case.truth) > 1e-6


def test_where_nothing_can_be_certified_x_stays():
    """At the minimum of Φ no step is a descent."""
    problem = Quadratic(num_upper=1)
    x = {"x": torch.zeros(1, dtype=torch.float64)}
    h0, h1 = (float(problem.hypergradient({"x": x["x"] + s})["x"]) for s in (0.0, 1.0))
    best = {"x": x["x"] - h0 / (h1 - h0)}
    case = closed_form(lambda seed: problem, 0)
    at = type(case)(
        problem,
        best,
        problem.lower_solution(best),
        problem.hypergradient(best),
        case.upper_batch,
        case.lower_batch,
    )
    got = at.estimate(MAID())
    assert got.step == 0.0
    assert got.state["accuracy"] < 1e-9


def test_an_indefinite_lower_level_is_refused():
    problem = Quadratic()
    problem.constants["A"].sub_(0.5 * torch.eye(10, dtype=torch.float64))
    case = closed_form(lambda seed: Quadratic(), 0)
    wrong = type(case)(
        problem,
        case.x,
        problem.lower_solution(case.x),
        case.truth,
        problem.constants,
        problem.constants,
    )
    with pytest.raises(ConvergenceError, match="strong convexity"):
        wrong.estimate(MAID())


def test_a_solver_without_a_tolerance_is_refused():
    case = closed_form(lambda seed: Quadratic(), 0)
    with pytest.raises(ProblemError, match="sets the tolerance"):
        case.estimate(MAID(adjoint=Dense()))


class Held(Quadratic):
    def project_upper(self, x):
        return x


def test_a_projection_of_x_is_refused():
    with pytest.raises(ProblemError, match="project_upper"):
        engine.refuse_mismatch(Setup(Held(), Gradient(), Upper(), MAID()))


def test_the_state_given_is_not_changed():
    case = closed_form(lambda seed: Quadratic(), 0)
    estimator = MAID()
    state = estimator.init(Point(case.x, case.y))
    kept = {name: part for name, part in state.items() if name != "adjoint"}
    estimator.estimate(case.losses(), Point(case.x, offset(case.y, 1.0)), state)
    assert {name: part for name, part in state.items() if name != "adjoint"} == kept
    assert tree.norm(state["adjoint"]) == 0


def test_what_is_no_certain_descent_is_solved_further():
    """A slope so large that F is long certain where h is not yet."""
    case = closed_form(lambda seed: Quadratic(), 0)
    got = case.estimate(MAID(sensitivity=1e5, strong_convexity=0.1), offset(case.y, 5.0))
    assert got.step is not None
    assert got.step > 0
    assert got.stats.error_bound <= 0.9 * tree.norm(got.hypergradient)


@pytest.mark.parametrize(("unknowns", "seed", "step"), [(1, 0, 1.0), (5, 0, 10.0), (5, 1, 10.0)])
def test_the_bound_holds_by_the_slope_that_was_seen(unknowns, seed, step):
    """None is given, and the adjoint's part of the bound alone would be less than the error here."""
    case = closed_form(lambda s: Quadratic(data_seed=s, num_upper=3, num_lower=unknowns), seed)
    estimator = MAID(accuracy=1.0, sensitivity=0.0, step=step, strong_convexity=0.1)
    got = case.estimate(estimator, offset(case.y, 3.0, seed))
    assert got.state["sensitivity"] > 0
    error = tree.norm(tree.sub(got.hypergradient, case.truth))
    assert 0 < error <= got.stats.error_bound


@pytest.mark.parametrize("far", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("descent", [0.1, 0.6])
def test_the_step_is_the_first_that_falls_by_the_share_asked_for(far, descent):
    """Φ along h is a parabola: a step s falls by s ‖h‖² (1 − c s / 2), c its curvature along h."""
    case = closed_form(lambda s: Quadratic(data_seed=s, num_upper=3, num_lower=1), 0)
    problem, x = case.problem, tree.scale(far, case.x)
    h = problem.hypergradient(x)
    there = problem.hypergradient(tree.axpy(-1.0, h, x))
    c = tree.dot(h, tree.sub(h, there)) / tree.dot(h, h)
    at = type(case)(problem, x, problem.lower_solution(x), h, case.upper_batch, case.lower_batch)
    got = at.estimate(MAID(accuracy=1e-10, descent=descent, step=8.0 / c))
    expected = next(s for s in (8 / c / 2**k for k in range(9)) if 1 - c * s / 2 >= descent)
    assert got.step == pytest.approx(expected, rel=1e-12)


def test_the_doubt_about_F_is_its_slope_and_the_square_of_the_distance():
    given = {"curvature": 0.5, "coupled": 0.0, "smoothness": 6.0, "stats": Stats()}
    found = _Found({}, 0.0, {}, 0.0, 0.0, 0.0, {}, **given)
    assert found.doubt(norm=0.1, slope_F=3.0) == pytest.approx(3.0 * 0.2 + 3 * 0.2**2, rel=1e-15)
    blind = replace(found, curvature=math.inf)
    assert blind.doubt(norm=0.1, slope_F=0.0) == 0.0
