"""A Lanczos basis carried from step to step: CG at fixed losses, cheaper than it on moving ones."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.lancbio import LancBiO
from bilevel.functional import hypergradient, solve_lower
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.lower.newton import Newton
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.runfolder import checkpoint
from bilevel_problems.quadratic import Quadratic
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, relative


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [PROBLEMS[k] for k in (0, 2, 3, 4, 5)])
@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_exact_after_as_many_products_as_unknowns(make, seed):
    case = closed_form(make, seed)
    m = tree.size(case.y)
    got = case.estimate(LancBiO(dimension=m, products=m, residual=True))
    values = torch.linalg.eigvalsh(case.hessian())
    condition = float(values[-1] / values[0])
    assert_close(got.hypergradient, case.truth, rtol=condition * 1e-11)
    assert got.stats.residual <= condition * 1e-14
    if m > 3:
        few = case.estimate(LancBiO(dimension=m, products=m // 3, residual=True))
        assert relative(few.hypergradient, case.truth) > 1e-4  # negative control
        assert few.stats.residual > 1e-4
        assert few.stats.converged is False


@pytest.mark.parametrize("make", PROBLEMS[:2], ids=NAMES[:2])
@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_at_fixed_losses_calls_add_up_to_conjugate_gradient(make):
    """Both are the Galerkin solution in the Krylov space of ∇y F."""
    case = closed_form(make, 0)
    state, hvps = None, 0
    for k in range(1, 7):
        got = case.estimate(LancBiO(dimension=10), state=state)
        state, hvps = got.state, hvps + got.stats.hvps
        cg = case.estimate(Implicit(solver=CG(iterations=k, tolerance=0.0)))
        assert_close(got.hypergradient, cg.hypergradient, rtol=1e-8)
    assert hvps == 6


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_a_full_basis_restarts_from_its_solution():
    """Restarted after 3: CG for 3 iterations, then CG for 2 more from where it ended."""
    case = closed_form(PROBLEMS[0], 0)
    state, hvps = None, []
    for _ in range(5):
        got = case.estimate(LancBiO(dimension=3), state=state)
        state = got.state
        hvps.append(got.stats.hvps)
    assert hvps == [1, 1, 1, 2, 1]
    three = case.estimate(Implicit(solver=CG(iterations=3, tolerance=0.0)))
    two = case.estimate(Implicit(solver=CG(iterations=2, tolerance=0.0)), state=three.state)
    assert_close(got.hypergradient, two.hypergradient, rtol=1e-8)
    at_once = case.estimate(LancBiO(dimension=3, products=5))
    assert_close(at_once.hypergradient, two.hypergradient, rtol=1e-8)
    assert at_once.stats.hvps == 6


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_converged_is_a_residual_within_the_tolerance():
    """Each of a falling row of residuals, called converged from itself on and not just below."""
    case = closed_form(PROBLEMS[0], 0)
    m = tree.size(case.y)
    for products in (m // 3, m // 2, m):
        estimator = LancBiO(dimension=m, products=products, residual=True)
        left = case.estimate(estimator).stats.residual
        for tolerance, reached in ((left, True), (0.999 * left, False)):
            stats = case.estimate(replace(estimator, tolerance=tolerance)).stats
            assert (stats.residual, stats.converged) == (left, reached)
    silent = case.estimate(LancBiO(dimension=m, products=m)).stats
    assert (silent.residual, silent.converged) == (None, None)


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_what_it_reports_is_so():
    """v after k products is that of conjugate gradient, and so are its residual and Ritz value."""
    case = closed_form(PROBLEMS[0], 0)
    A, k = case.hessian(), case.problem.constants
    b = {"y": 7.0 * (case.y["y"] - k["t"] + k["D"] @ case.x["x"])}
    assert abs(tree.norm(b) - 1) > 1, "or a factor of the size of b would not be seen"
    cg = CG(iterations=3, tolerance=0.0).solve(lambda v: {"y": A @ v["y"]}, b, tree.zeros_like(b))
    residual = float((b["y"] - A @ cg.solution["y"]).norm()) / tree.norm(b)
    got = hypergradient(
        lambda *at: 7.0 * case.problem.upper_loss(*at),
        case.problem.lower_loss,
        case.x,
        case.y,
        estimator=LancBiO(dimension=10, products=3, residual=True),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
    )
    assert got.stats.iterations == 3
    assert got.stats.residual == pytest.approx(residual, rel=1e-8)
    assert got.stats.converged is False


def test_damping_and_residual():
    case = closed_form(PROBLEMS[0], 0)
    m = tree.size(case.y)
    damped = LancBiO(dimension=m, products=m, damping=0.3, residual=True)
    got = case.estimate(damped)
    assert_close(
        got.hypergradient,
        case.estimate(Implicit(solver=Dense(), damping=0.3)).hypergradient,
        rtol=1e-9,
    )
    assert got.stats.hvps == m + 1
    assert damped.claim is None
    assert LancBiO().claim == "solution"


@pytest.mark.untrusted("G is not convex there on purpose")
def test_says_where_the_lower_level_is_not_convex():
    def saddle(x, y, _):
        return (torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64) * y["y"] ** 2).sum() / 2 + (
            x["x"] * y["y"]
        ).sum()

    def upper(x, y, _):
        return (y["y"] - 1).square().sum()

    x = {"x": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)}
    y = {"y": -x["x"] / torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)}
    estimator = LancBiO(dimension=3, products=3)
    got = hypergradient(upper, saddle, x, y, estimator=estimator)
    assert got.stats.curvature < 0
    exact = hypergradient(upper, saddle, x, y, estimator=Implicit(solver=Dense()))
    assert_close(got.hypergradient, exact.hypergradient, rtol=1e-10)


def test_nothing_to_solve_costs_nothing():
    case = closed_form(PROBLEMS[0], 0)

    def blind(x, y, _):
        return (x["x"] ** 2).sum() + 0 * y["y"].sum()

    got = hypergradient(
        blind,
        case.problem.lower_loss,
        case.x,
        case.y,
        estimator=LancBiO(products=3),
        lower_batch=case.lower_batch,
    )
    assert got.stats.hvps == 0
    assert_close(got.hypergradient, tree.scale(2.0, case.x), rtol=1e-14)


def logistic(seed, samples=120, features=30):
    """Per-feature penalties on a logistic regression: a Hessian that moves with x and y."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale = 10 ** torch.linspace(0, -0.75, features, dtype=torch.float64)
    weights = normal(features) / scale.sqrt()
    parts = []
    for _ in range(2):
        A = normal(samples, features) * scale
        parts.append((A, (A @ weights + 0.5 * normal(samples) > 0).double()))
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def upper(x, y, _):
        return bce(parts[0][0] @ y["w"], parts[0][1])

    def lower(x, y, _):
        penalty = (x["x"].exp() * y["w"] ** 2).sum() / 2
        return bce(parts[1][0] @ y["w"], parts[1][1]) + penalty

    x = {"x": torch.full((features,), -6.0, dtype=torch.float64)}
    return upper, lower, x, {"w": torch.zeros(features, dtype=torch.float64)}


def along(estimator, seed, steps=24, size=0.003):
    """(median relative error, HVPs a step) in the last half of a run along the true hypergradient."""
    upper, lower, x, y = logistic(seed)
    state, errors, hvps = None, [], 0
    for _ in range(steps):
        y = solve_lower(lower, x, y, solver=Newton()).y
        got = hypergradient(upper, lower, x, y, estimator=estimator, state=state)
        truth = hypergradient(upper, lower, x, y, estimator=Implicit(solver=Dense()))
        state, hvps = got.state, hvps + got.stats.hvps
        errors.append(relative(got.hypergradient, truth.hypergradient))
        step = size * math.sqrt(tree.size(x)) / tree.norm(truth.hypergradient)
        x = tree.axpy(-step, truth.hypergradient, x)
    return statistics.median(errors[steps // 2 :]), hvps / steps


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_fewer_products_than_cold_cg_for_the_same_error():
    """Medians over 3 seeds; cold CG has as many products a step as stated."""
    cold = Implicit(solver=CG(iterations=7, tolerance=1e-12), start="cold")
    medians = {}
    for name, estimator in {
        "lancbio": LancBiO(),
        "cold": cold,
        "warm": Implicit(solver=CG(iterations=1, tolerance=1e-12)),
    }.items():
        found = [along(estimator, seed) for seed in range(3)]
        medians[name] = [statistics.median(column) for column in zip(*found, strict=True)]
    assert medians["lancbio"][0] < medians["cold"][0]
    assert medians["lancbio"][0] < medians["warm"][0]
    assert medians["lancbio"][1] == pytest.approx(1.2, abs=0.05)
    assert medians["cold"][1] == 7
    assert medians["warm"][1] == pytest.approx(2, abs=0.05)


def test_does_not_follow_a_problem_that_moves_fast():
    """Negative control of the test above: the basis is of no use once A is another."""
    errors = [
        statistics.median(along(LancBiO(), s, size=size)[0] for s in range(3))
        for size in (0.003, 0.1)
    ]
    assert errors[1] > 4 * errors[0]


def test_state_is_not_changed_and_resumes_bit_for_bit(tmp_path):
    case = closed_form(PROBLEMS[0], 0)
    first = case.estimate(LancBiO(dimension=4, products=3))
    basis, following = list(first.state["basis"]), tree.clone(first.state["next"])
    once, twice = (case.estimate(LancBiO(dimension=4), state=first.state) for _ in range(2))
    assert relative(once.hypergradient, twice.hypergradient) == 0
    assert len(first.state["basis"]) == len(basis) == 3
    assert relative(first.state["next"], following) == 0

    setup = Setup(Quadratic(condition=10), Newton(), Upper(steps=7), LancBiO(), dtype=torch.float64)
    whole = engine.start(setup)
    list(engine.run(setup, whole))
    half = engine.start(setup)
    for _ in engine.run(setup, half):
        if half.step == 3:
            break
    checkpoint.save(tmp_path, half.save(), step=3)
    again = engine.restore(setup, checkpoint.load(tmp_path / "step-00000003"))
    list(engine.run(setup, again))
    assert torch.equal(again.x["x"], whole.x["x"])
