"""Is a hypergradient right? `check` holds estimators to their claims on any problem.

The reference is the problem's closed form where it has one; else central differences of Φ
through a re-solved lower level; else a converged adjoint whose products are verified by first
differences of ∇G. Everything is in float64.

For authors: `check_problem` and `check_estimator` hold a problem and an estimator to the contract
of their protocols, and raise `CheckError` with all that is wrong. Nothing
in a run imports it.
"""

from bilevel.testing.estimator import check_estimator
from bilevel.testing.problem import check_problem
from bilevel.testing.reference import (
    STATIONARY,
    Reference,
    Scene,
    reference_at,
    scene_at,
    solve_tightly,
)
from bilevel.testing.verdicts import CheckRow, Verdict, check

__all__ = [
    "STATIONARY",
    "CheckRow",
    "Reference",
    "Scene",
    "Verdict",
    "check",
    "check_estimator",
    "check_problem",
    "reference_at",
    "scene_at",
    "solve_tightly",
]
