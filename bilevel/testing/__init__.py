"""Is a hypergradient right? `check` holds estimators to their claims on any problem.

The reference is the problem's closed form where it has one; else central differences of Φ
through a re-solved lower level; else a converged adjoint whose products are verified by first
differences of ∇G. Everything is in float64. `path_agreement` asks another question: does it point
where the run goes, whose lower level is never solved?

`check_table` is `check` as one table.

For authors: `check_problem` and `check_estimator` hold a problem and an estimator to the contract
of their protocols, and raise `CheckError` with all that is wrong. Nothing
in a run imports it.
"""

from bilevel.testing.estimator import check_estimator
from bilevel.testing.path_agreement import Agreement, PathRow, path_agreement
from bilevel.testing.problem import check_problem
from bilevel.testing.reference import (
    STATIONARY,
    Reference,
    Scene,
    reference_at,
    scene_at,
    solve_tightly,
)
from bilevel.testing.table import CheckTable, check_table
from bilevel.testing.verdicts import CheckRow, Verdict, check

__all__ = [
    "STATIONARY",
    "Agreement",
    "CheckRow",
    "CheckTable",
    "PathRow",
    "Reference",
    "Scene",
    "Verdict",
    "check",
    "check_estimator",
    "check_problem",
    "check_table",
    "path_agreement",
    "reference_at",
    "scene_at",
    "solve_tightly",
]
