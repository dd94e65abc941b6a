"""Lower levels that L-BFGS solves, and the pairs it leaves."""

from bilevel.functional import solve_lower
from bilevel.lower.lbfgs import LBFGS
from tests.cases import offset

WELL = [0, 3, 4, 5]
"""Problems whose lower level L-BFGS solves within a few times dim(y) evaluations."""


def solved(case, seed=0, **options):
    solver = LBFGS(**{"tolerance": 1e-8, "steps": 300, "history": 60, **options})
    start = offset(case.y, 1.0, seed)
    return solve_lower(
        case.problem.lower_loss, case.x, start, solver=solver, batch=case.lower_batch
    )
