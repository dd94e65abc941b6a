"""SHINE: the adjoint from the pairs of the lower solve."""

import pytest
import torch

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.shine import Shine
from bilevel.events import Stepped
from bilevel.functional import hypergradient, solve_lower
from bilevel.linear.cg import CG
from bilevel.linear.quasi_newton import bfgs
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.preconditioners.lbfgs_pairs import LBFGSPairs
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.runfolder import checkpoint
from bilevel.types import LowerSolution, Point
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, relative
from tests.estimators.pairs import WELL, solved


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [PROBLEMS[k] for k in WELL], ids=[NAMES[k] for k in WELL])
def test_block_is_exact_once_the_pairs_span(make, seed):
    case = closed_form(make, seed)
    solution = solved(case, seed)
    assert len(solution.pairs) >= tree.size(case.y)
    got = case.estimate(Shine(memory=60, update="block"), solution)
    # rounding in the smallest changes kept, 1e-8 of the largest, times what inverting M adds
    assert_close(got.hypergradient, case.truth, rtol=1e-5)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 0, 1)
    assert got.stats.iterations == len(solution.pairs)
    half = case.estimate(Shine(memory=tree.size(case.y) // 2, update="block"), solution)
    assert relative(half.hypergradient, case.truth) > 1e-2  # negative control: half of them


@pytest.mark.parametrize("update", ["bfgs", "block"])
def test_error_falls_with_memory(update):
    """Medians over 9 cases; B = I is where it starts."""
    errors = []
    for memory in (0, 5, 60):
        found = []
        for make in (PROBLEMS[0], PROBLEMS[3], PROBLEMS[5]):
            for seed in range(3):
                case = closed_form(make, seed)
                solution = solved(case, seed)
                pairs = solution.pairs if memory else ()
                shine = Shine(memory=memory or 1, update=update)
                got = case.estimate(shine, LowerSolution(solution.y, pairs=pairs))
                found.append(relative(got.hypergradient, case.truth))
        errors.append(float(torch.tensor(found).median()))
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2], errors


def test_shine_is_its_formula():
    case = closed_form(PROBLEMS[0], 1)
    solution = solved(case, steps=6)
    at = Point(case.x, solution.y)
    losses = case.losses()
    _, F_x, F_y = calculus.gradients(losses.upper, at)
    v = bfgs(solution.pairs[-4:])(F_y)
    expected = tree.sub(F_x, calculus.linearize(losses.lower, at).vjp_xy(v))
    got = case.estimate(Shine(memory=4), solution)
    assert_close(got.hypergradient, expected, rtol=1e-12)
    assert (
        relative(
            got.hypergradient,
            case.estimate(Shine(memory=5), solution).hypergradient,
        )
        > 1e-6
    )


def test_damping_is_that_of_the_damped_system():
    """With pairs that span, B⁻¹ is the inverse of the damped Hessian."""
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    F_y = calculus.gradients(case.losses().upper, Point(case.x, solution.y))[2]
    damped = case.hessian() + 0.3 * torch.eye(tree.size(case.y), dtype=torch.float64)
    v = tree.cast(torch.linalg.solve(damped, tree.flatten(F_y)), F_y)
    at = Point(case.x, solution.y)
    F_x = calculus.gradients(case.losses().upper, at)[1]
    expected = tree.sub(F_x, calculus.linearize(case.losses().lower, at).vjp_xy(v))
    shine = Shine(memory=60, update="block", damping=0.3)
    got = case.estimate(shine, solution)
    assert_close(got.hypergradient, expected, rtol=1e-5)
    refined = case.estimate(
        Shine(damping=0.3, refine=CG(tolerance=1e-12, iterations=60)),
        solution,
    )
    assert_close(refined.hypergradient, expected, rtol=1e-9)


def test_refinement_starts_from_the_pairs():
    """Fewer products than from zero for the same residual, and the same answer in the end."""
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    cg = CG(tolerance=1e-5, iterations=100)
    near = case.estimate(Shine(memory=60, update="block", refine=cg), solution)
    cold = case.estimate(Shine(refine=cg), LowerSolution(solution.y, pairs=()))
    assert near.stats.hvps <= 2 < cold.stats.hvps
    assert near.stats.residual <= 1e-5
    tight = case.estimate(Shine(refine=CG(tolerance=1e-12, iterations=100)), solution)
    assert_close(tight.hypergradient, case.truth, rtol=1e-7)
    assert Shine().claim is None
    assert Shine(refine=cg).claim == "solution"
    assert Shine(refine=cg, damping=0.1).claim is None


def test_without_pairs_it_is_refused_with_the_remedy():
    case = closed_form(PROBLEMS[0], 0)
    with pytest.raises(ProblemError, match="lower: lbfgs"):
        case.estimate(Shine())
    for lower in (Gradient(), Newton()):
        setup = Setup(case.problem, lower, Upper(steps=1), Shine())
        with pytest.raises(ProblemError, match="keeps none; use lower: lbfgs"):
            engine.refuse_mismatch(setup)


@pytest.mark.parametrize(
    "estimator", [Shine(), Implicit(preconditioner=LBFGSPairs())], ids=["shine", "lbfgs_pairs"]
)
def test_what_is_advised_where_there_are_no_pairs_helps(estimator):
    def F(x, y):
        return (y["w"] - 1).square().sum()

    def G(x, y):
        return (y["w"] - x["x"]).square().sum()

    x, y = {"x": torch.full((2,), 3.0)}, {"w": torch.zeros(2)}
    remedy = r"pass as y what bilevel\.solve_lower\(\.\.\., solver=LBFGS\(\)\) returns"
    with pytest.raises(ProblemError, match=remedy):
        hypergradient(F, G, x, y, estimator=estimator)
    y = solve_lower(G, x, y, solver=LBFGS())
    found = hypergradient(F, G, x, y, estimator=estimator)
    assert_close(found.hypergradient, {"x": torch.full((2,), 4.0)}, rtol=1e-4)


def test_tied_variables_keep_their_pairs():
    def tied(x, y, _):
        return ((y["a"] - x["x"]) ** 2).sum() + (y["b"] ** 4).sum() + (y["b"] ** 2).sum()

    def upper(x, y, _):
        return (y["a"] ** 2).sum() + (x["x"] * y["b"]).sum()

    shared = torch.tensor([0.4, -0.7, 1.0], dtype=torch.float64)
    x, y = {"x": shared.clone() + 0.2}, {"a": shared, "b": shared}
    found = solve_lower(tied, x, y, solver=LBFGS())
    assert found.pairs[0][0].keys() == {"a", "b"}
    joined = {"a": found.y["a"], "b": found.y["a"]}
    got = hypergradient(upper, tied, x, LowerSolution(joined, pairs=found.pairs), estimator=Shine())
    apart = tuple(({"a": s["a"]}, {"a": c["a"]}) for s, c in found.pairs)

    def one(function):
        return lambda x, y, batch: function(x, {"a": y["a"], "b": y["a"]}, batch)

    expected = hypergradient(
        one(upper), one(tied), x, LowerSolution({"a": found.y["a"]}, pairs=apart), estimator=Shine()
    )
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-12)


def test_pairs_of_earlier_solves_are_kept_and_saved():
    """Warm-started lower solves take few steps: with their own pairs alone little would be known."""
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    first = case.estimate(Shine(memory=60, update="block"), solution)
    again = case.estimate(
        Shine(memory=60, update="block"), LowerSolution(solution.y, pairs=()), state=first.state
    )
    assert_close(again.hypergradient, first.hypergradient, rtol=1e-10)
    assert len(first.state["steps"]) == len(solution.pairs)
    short = case.estimate(
        Shine(memory=3), LowerSolution(solution.y, pairs=solution.pairs[:2]), state=first.state
    )
    assert len(short.state["steps"]) == 3
    assert relative(short.state["steps"][-1], solution.pairs[1][0]) == 0
    assert len(first.state["steps"]) == len(solution.pairs)  # what was given is not changed


def test_a_run_uses_the_pairs_and_resumes_bit_for_bit(tmp_path):
    problem = Quadratic(condition=10)
    lower, shine = LBFGS(history=40), Shine(memory=40, update="block")
    setup = Setup(problem, lower, Upper(steps=6), shine, dtype=torch.float64)
    whole, x = engine.start(setup), None
    for event in engine.run(setup, whole):
        if isinstance(event, Stepped):
            assert (event.estimate.hvps, event.estimate.cross_products) == (0, 1)
            if x is not None:
                truth = tree.norm(problem.hypergradient(x))
                assert event.hypergradient_norm == pytest.approx(truth, rel=1e-4)
            x = tree.clone(whole.x)
    half = engine.start(setup)
    for event in engine.run(setup, half):
        if isinstance(event, Stepped) and event.step == 3:
            break
    checkpoint.save(tmp_path, half.save(), step=3)
    again = engine.restore(setup, checkpoint.load(tmp_path / "step-00000003"))
    list(engine.run(setup, again))
    assert torch.equal(again.x["x"], whole.x["x"])
    assert not torch.equal(half.x["x"], whole.x["x"])
