"""What mutants of the sources once got away with, file by file; each test killed one of them."""

import pytest
import torch

from bilevel import hypergradient, tree
from bilevel.adjoint.starts import begin
from bilevel.adjoint.stopping import HoldsError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.linear.guards import attainable_residual
from tests.cases import PROBLEMS, assert_close, closed_form
from tests.linear.systems import log_spectrum, run_cg, system

# estimators/implicit.py --------------------------------------------------------------------------


def test_an_entry_that_G_does_not_use_stays_out_of_the_adjoint_system():
    """∂²yy G has a zero block there; with it conjugate gradient meets curvature 0 and gives up."""
    case = closed_form(PROBLEMS[0], 0)

    def upper(x, y, batch):
        return case.problem.upper_loss(x, y, batch) + 5 * y["unused"].sum()

    got = hypergradient(
        upper,
        case.problem.lower_loss,
        case.x,
        {**case.y, "unused": torch.ones(3, dtype=torch.float64)},
        estimator=Implicit(solver=CG(iterations=200, tolerance=1e-11)),
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
    )
    assert_close(got.hypergradient, case.truth, rtol=1e-8)
    assert got.stats.converged
    assert (got.stats.curvature or 0) > 0


@pytest.mark.parametrize(
    ("start", "depth"), [("cold", 0), ("warm", 1), ("linear", 2), ("galerkin", 3)]
)
def test_a_start_is_handed_the_last_adjoints_it_looks_at(start, depth):
    case = closed_form(PROBLEMS[0], 0)
    estimator = Implicit(solver=CG(iterations=500, tolerance=1e-9), start=start)
    A, k = case.hessian(), case.problem.constants
    state, truths = None, []
    for factor in (1.0, 2.0, 3.0, 4.0, 5.0):
        y = tree.scale(factor, case.y)
        state = case.estimate(estimator, y=y, state=state).state
        truths.append(torch.linalg.solve(A, y["y"] - k["t"] + k["D"] @ case.x["x"]))
        assert len(state["past"]) == min(depth, len(truths))
        for kept, truth in zip(reversed(state["past"]), reversed(truths), strict=False):
            # the tolerance times the condition number
            assert_close(kept, {"y": truth}, rtol=1e-9 * 100)
    again = case.estimate(estimator, y=y, state=state)
    assert (again.stats.iterations == 0) is (start in ("warm", "galerkin"))


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_the_default_solver_may_take_ten_iterations_an_unknown_for_an_asked_error(monkeypatch):
    case, allowed, budget = closed_form(PROBLEMS[0], 0), [], CG._budget

    def seen(self, *args, **options):
        allowed.append(budget(self, *args, **options))
        return allowed[-1]

    monkeypatch.setattr(CG, "_budget", seen)
    for estimator in (
        Implicit(target_error=1e-3),
        Implicit(target_error=1e-3, solver=CG(iterations=7)),
    ):
        case.estimate(estimator)
    assert [*dict.fromkeys(allowed)] == [10 * tree.size(case.y) + 100, 7]
    case.estimate(Implicit())
    assert allowed[-1] == 20


# adjoint/ ----------------------------------------------------------------------------------------


def test_galerkin_tells_adjoints_apart_that_are_nearly_the_same():
    """Differences of 1e-7 of the length still span a direction: they are brought to length 1."""
    matvec, A, b = system(log_spectrum(12, 10), 0)
    truth = tree.unflatten(torch.linalg.solve(A, tree.flatten(b)), b)
    newest = tree.map(torch.ones_like, b)
    # the truth lies in the span, 1e7 times as far as the two adjoints lie apart
    older = tree.axpy(-1e-7, tree.sub(truth, newest), newest)
    v, _ = begin("galerkin", matvec, b, [older, newest])
    # the difference is known to eps / 1e-7 = 2e-9 of its length, the Gram matrix is good to 10
    assert_close(v, truth, rtol=1e-7)


def test_the_stopping_rule_looks_at_four_steps_and_half_as_many_again():
    matvec, _, b = system(log_spectrum(60, 1e3), 0)
    now, looks = [0], []

    def cross(v):
        looks.append(now[0])
        return tree.scale(-1.0, v)

    rule = HoldsError(1e-300, cross, {})

    def enough(progress):
        now[0] = progress.steps
        return rule(progress)

    run_cg(CG(iterations=30, tolerance=0.0), matvec, b, stop=enough)
    assert looks == [4, 6], "two looks give a ratio; from then on only where it says enough"


# linear/cg.py ------------------------------------------------------------------------------------


def test_the_residual_attained_is_that_of_rounding_or_of_the_recursion():
    v = {"y": torch.tensor([30.0, 40.0], dtype=torch.float64)}
    eps = torch.finfo(torch.float64).eps
    floor = 0.5 * eps * (7.0 * 50.0 / 2.0 + 1)
    assert attainable_residual(1e-30, v, 2.0, 7.0) == pytest.approx(floor, rel=1e-12, abs=0)
    assert attainable_residual(1e-30, v, 2.0, 0.0) == pytest.approx(0.5 * eps, rel=1e-12, abs=0)
    assert attainable_residual(1e-3, v, 2.0, 7.0) == pytest.approx(5e-4, rel=1e-12, abs=0)
    assert attainable_residual(0.0, v, 2.0, 7.0) == 0.0
