"""What every preconditioner keeps along a run."""

import pytest
import torch

from bilevel import hypergradient
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.preconditioners.hutchinson import Hutchinson
from bilevel.preconditioners.none import Nothing
from bilevel.preconditioners.nystrom import Nystrom
from bilevel.preconditioners.recycled import Recycled
from tests.cases import PROBLEMS, assert_close, closed_form

PRECONDITIONERS = [Nothing(), Hutchinson(), Nystrom(rank=20), Recycled()]


@pytest.mark.parametrize("chosen", PRECONDITIONERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "make", PROBLEMS, ids=["q", "ill", "1 lower", "1 upper", "ridge", "scaled"]
)
def test_each_leads_to_the_closed_form_along_a_run(chosen, make):
    case = closed_form(make, 0)
    values = torch.linalg.eigvalsh(case.hessian())
    condition = float(values[-1] / values[0])
    estimator = Implicit(solver=CG(iterations=3000, tolerance=1e-11), preconditioner=chosen)
    state = None
    for _ in range(5):
        got = case.estimate(estimator, state=state)
        state = got.state
        assert_close(got.hypergradient, case.truth, rtol=max(1e-9, condition * 1e-10))


@pytest.mark.parametrize("chosen", PRECONDITIONERS, ids=lambda p: type(p).__name__)
def test_a_zero_right_hand_side_has_adjoint_zero(chosen):
    case = closed_form(PROBLEMS[0], 0)

    def flat(x, y, batch):
        return (x["x"] ** 2).sum() + 0 * y["y"].sum()

    for error in (None, 1e-3):
        estimator, state = Implicit(preconditioner=chosen, target_error=error), None
        for _ in range(3):
            got = hypergradient(
                flat,
                case.problem.lower_loss,
                case.x,
                case.y,
                estimator=estimator,
                lower_batch=case.lower_batch,
                state=state,
            )
            state = got.state
            torch.testing.assert_close(got.hypergradient["x"], 2 * case.x["x"], rtol=1e-14, atol=0)
            assert got.stats.converged
