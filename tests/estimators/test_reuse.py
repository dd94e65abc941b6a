"""Adjoints from what is already known: pairs of an L-BFGS lower solve."""

import pytest
import torch

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.shine import Shine
from bilevel.events import Stepped
from bilevel.functional import hypergradient, solve_lower
from bilevel.linear.cg import CG
from bilevel.linear.dense import matrix
from bilevel.linear.quasi_newton import bfgs, block
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.preconditioners.lbfgs_pairs import LBFGSPairs
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.runfolder import checkpoint
from bilevel.types import Point
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset, relative

WELL = [0, 3, 4, 5]
"""Problems whose lower level L-BFGS solves within a few times dim(y) evaluations."""


def solved(case, seed=0, **options):
    solver = LBFGS(**{"tolerance": 1e-8, "steps": 300, "history": 60, **options})
    start = offset(case.y, 1.0, seed)
    return solve_lower(
        case.problem.lower_loss, case.x, start, solver=solver, batch=case.lower_batch
    )


def random_pairs(dim, count, seed=0):
    """(A, pairs of random steps and their products with a symmetric positive definite A)"""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    A = root @ root.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    steps = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return A, [({"a": s[:2], "b": s[2:]}, {"a": (A @ s)[:2], "b": (A @ s)[2:]}) for s in steps]


def as_matrix(invert, like):
    return matrix(invert, like)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_bfgs_is_its_update_typed_out(count):
    _, pairs = random_pairs(7, count)
    like = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    eye = torch.eye(7, dtype=torch.float64)
    H = eye
    if pairs:
        s, c = (tree.flatten(part) for part in pairs[-1])
        H = (s @ c) / (c @ c) * eye
    for pair in pairs:
        s, c = (tree.flatten(part)[:, None] for part in pair)
        rho = 1 / (s.T @ c)
        H = (eye - rho * s @ c.T) @ H @ (eye - rho * c @ s.T) + rho * s @ s.T
    torch.testing.assert_close(as_matrix(bfgs(pairs), like), H, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 12])
def test_block_satisfies_every_secant_equation(count):
    A, pairs = random_pairs(7, count)
    like = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    inverse = as_matrix(block(pairs), like)
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    for s, c in pairs:
        assert_close(block(pairs)(c), s, rtol=1e-7)
    if count >= 7:
        torch.testing.assert_close(inverse, torch.linalg.inv(A), rtol=1e-7, atol=1e-7)
    else:
        assert float((inverse - torch.linalg.inv(A)).norm()) > 0.1


def test_bfgs_keeps_only_the_last_secant_equation():
    """Negative control, and the reason that block exists."""
    _, pairs = random_pairs(7, 7)
    assert_close(bfgs(pairs)(pairs[-1][1]), pairs[-1][0], rtol=1e-10)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(bfgs(pairs)(pairs[0][1]), pairs[0][0], rtol=1e-2)


@pytest.mark.parametrize("make", [PROBLEMS[k] for k in WELL], ids=[NAMES[k] for k in WELL])
def test_pairs_of_the_lower_solve_are_products_with_the_hessian(make):
    case = closed_form(make, 0)
    solution = solved(case)
    H = case.hessian()
    assert solution.pairs
    for s, c in solution.pairs:
        # kept changes are above 1e-8 of the largest, and rounding is below 1e-13 of it
        assert_close(c, tree.cast(H @ tree.flatten(s), c), rtol=1e-4)


def test_pairs_are_the_evaluations_that_were_made_anyway():
    case = closed_form(PROBLEMS[0], 0)
    many = solved(case, tolerance=1e-4)
    assert len(many.pairs) == many.stats.gradients - 1 > 10
    assert len(solved(case, tolerance=1e-4, history=3).pairs) == 3
    way = tree.zeros_like(many.y)
    for step, _ in many.pairs:
        way = tree.add(way, step)
    assert_close(way, tree.sub(many.y, offset(case.y, 1.0)), rtol=1e-12)


def test_pairs_have_positive_curvature_where_the_loss_has_not():
    def bent(x, y, _):
        return (y["y"] ** 4).sum() / 4 - (y["y"] ** 2).sum() / 2 + (x["x"] * y["y"]).sum()

    x = {"x": torch.full((4,), 0.1, dtype=torch.float64)}
    y = {"y": torch.tensor([0.05, -0.02, 0.3, 0.01], dtype=torch.float64)}
    found = solve_lower(bent, x, y, solver=LBFGS(history=50))
    assert found.stats.converged
    assert len(found.pairs) < found.stats.gradients - 1
    assert all(tree.dot(s, c) > 0 for s, c in found.pairs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [PROBLEMS[k] for k in WELL], ids=[NAMES[k] for k in WELL])
def test_block_is_exact_once_the_pairs_span(make, seed):
    case = closed_form(make, seed)
    solution = solved(case, seed)
    assert len(solution.pairs) >= tree.size(case.y)
    got = case.estimate(Shine(memory=60, update="block"), solution.y, pairs=solution.pairs)
    # rounding in the smallest changes kept, 1e-8 of the largest, times what inverting M adds
    assert_close(got.hypergradient, case.truth, rtol=1e-5)
    assert (got.stats.gradients, got.stats.hvps, got.stats.cross_products) == (2, 0, 1)
    assert got.stats.iterations == len(solution.pairs)
    half = case.estimate(
        Shine(memory=tree.size(case.y) // 2, update="block"), solution.y, pairs=solution.pairs
    )
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
                got = case.estimate(shine, solution.y, pairs=pairs)
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
    got = case.estimate(Shine(memory=4), solution.y, pairs=solution.pairs)
    assert_close(got.hypergradient, expected, rtol=1e-12)
    assert (
        relative(
            got.hypergradient,
            case.estimate(Shine(memory=5), solution.y, pairs=solution.pairs).hypergradient,
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
    got = case.estimate(shine, solution.y, pairs=solution.pairs)
    assert_close(got.hypergradient, expected, rtol=1e-5)
    refined = case.estimate(
        Shine(damping=0.3, refine=CG(tolerance=1e-12, iterations=60)),
        solution.y,
        pairs=solution.pairs,
    )
    assert_close(refined.hypergradient, expected, rtol=1e-9)


def test_refinement_starts_from_the_pairs():
    """Fewer products than from zero for the same residual, and the same answer in the end."""
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    cg = CG(tolerance=1e-5, iterations=100)
    ask = {"y": solution.y, "pairs": solution.pairs}
    near = case.estimate(Shine(memory=60, update="block", refine=cg), **ask)
    cold = case.estimate(Shine(refine=cg), solution.y, pairs=())
    assert near.stats.hvps <= 2 < cold.stats.hvps
    assert near.stats.residual <= 1e-5
    tight = case.estimate(Shine(refine=CG(tolerance=1e-12, iterations=100)), **ask)
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
    got = hypergradient(upper, tied, x, joined, estimator=Shine(), pairs=found.pairs)
    apart = tuple(({"a": s["a"]}, {"a": c["a"]}) for s, c in found.pairs)

    def one(function):
        return lambda x, y, batch: function(x, {"a": y["a"], "b": y["a"]}, batch)

    expected = hypergradient(
        one(upper), one(tied), x, {"a": found.y["a"]}, estimator=Shine(), pairs=apart
    )
    assert_close(got.hypergradient, expected.hypergradient, rtol=1e-12)


def test_pairs_of_earlier_solves_are_kept_and_saved():
    """Warm-started lower solves take few steps: with their own pairs alone little would be known."""
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    ask = {"y": solution.y, "state": None}
    first = case.estimate(Shine(memory=60, update="block"), pairs=solution.pairs, **ask)
    again = case.estimate(Shine(memory=60, update="block"), solution.y, pairs=(), state=first.state)
    assert_close(again.hypergradient, first.hypergradient, rtol=1e-10)
    assert len(first.state["steps"]) == len(solution.pairs)
    short = case.estimate(Shine(memory=3), solution.y, pairs=solution.pairs[:2], state=first.state)
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


@pytest.mark.parametrize("update", ["bfgs", "block"])
def test_pairs_precondition_conjugate_gradient(update):
    """Fewer products to the same residual than without, for the same answer; medians over 3 seeds."""
    solver, counts = CG(iterations=400, tolerance=1e-8), []
    for seed in range(3):
        case = closed_form(PROBLEMS[1], seed)  # 40 unknowns, condition number 1e4
        solution = solved(case, seed)
        preconditioner = LBFGSPairs(memory=60, update=update)
        plain, helped = (
            case.estimate(
                Implicit(solver=solver, preconditioner=chosen), solution.y, pairs=solution.pairs
            )
            for chosen in (None, preconditioner)
        )
        assert plain.stats.converged
        assert helped.stats.converged
        assert_close(helped.hypergradient, plain.hypergradient, rtol=1e4 * 2e-8)
        counts.append((plain.stats.hvps, helped.stats.hvps))
    before, after = (torch.tensor(column).median() for column in zip(*counts, strict=True))
    assert before > 1.3 * after, counts


def test_pairs_that_span_leave_one_iteration():
    case = closed_form(PROBLEMS[0], 0)
    solution = solved(case)
    preconditioner = LBFGSPairs(memory=60)
    estimator = Implicit(solver=CG(tolerance=1e-6), damping=0.2, preconditioner=preconditioner)
    got = case.estimate(estimator, solution.y, pairs=solution.pairs)
    assert got.stats.hvps == 1
    none = case.estimate(estimator, solution.y, pairs=())
    assert none.stats.hvps > 5
    assert_close(got.hypergradient, none.hypergradient, rtol=1e-4)


def test_a_preconditioner_of_pairs_needs_them():
    case = closed_form(PROBLEMS[0], 0)
    estimator = Implicit(preconditioner=LBFGSPairs())
    with pytest.raises(ProblemError, match="lower: lbfgs"):
        case.estimate(estimator)
    with pytest.raises(ProblemError, match="keeps none; use lower: lbfgs"):
        engine.refuse_mismatch(Setup(case.problem, Gradient(), Upper(steps=1), estimator))
    engine.refuse_mismatch(Setup(case.problem, LBFGS(), Upper(steps=1), estimator))
