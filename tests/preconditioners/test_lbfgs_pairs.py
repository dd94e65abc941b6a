"""Pairs of the lower solve as preconditioner."""

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.preconditioners.lbfgs_pairs import LBFGSPairs
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import LowerSolution
from tests.cases import PROBLEMS, assert_close, closed_form
from tests.estimators.pairs import solved


@pytest.mark.untrusted("the lower solve ends where its pairs are enough")
@pytest.mark.parametrize("update", ["bfgs", "block"])
def test_pairs_precondition_conjugate_gradient(update):
    """Fewer products to the same residual than without, for the same answer; medians over 3 seeds."""
    solver, counts = CG(iterations=400, tolerance=1e-8), []
    for seed in range(3):
        case = closed_form(PROBLEMS[1], seed)  # 40 unknowns, condition number 1e4
        solution = solved(case, seed)
        preconditioner = LBFGSPairs(memory=60, update=update)
        plain, helped = (
            case.estimate(Implicit(solver=solver, preconditioner=chosen), solution)
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
    got = case.estimate(estimator, solution)
    assert got.stats.hvps == 1
    none = case.estimate(estimator, LowerSolution(solution.y, pairs=()))
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
