"""Entries of y that F uses and G does not: no lower level moves them, so no adjoint has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.estimators.fixed_point import FixedPoint
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.kkt import KKT
from bilevel.estimators.lancbio import LancBiO
from bilevel.estimators.maid import MAID
from bilevel.estimators.shine import Shine
from bilevel.estimators.single_loop import SingleLoop
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.lower.lbfgs import LBFGS
from bilevel.types import Structure
from tests.cases import PROBLEMS, assert_close, closed_form

HELD = Structure(constraints=lambda x, y, _: {"inequality": y["y"] - 1e3})
PROX = Structure(prox=lambda x, y, step: tree.map(lambda p: p + 0.0, y))
SETTLED = {"lower_lr": 0.9, "adjoint_lr": 0.9, "tolerance": 1e-10}
TIGHT: dict[str, Any] = {"iterations": 300, "tolerance": 1e-11}

ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "implicit cg": (Implicit(solver=CG(**TIGHT)), {}),
    "implicit minres": (Implicit(solver=MINRES(**TIGHT)), {}),
    "implicit neumann": (Implicit(solver=Neumann(iterations=5000, scale=0.9, tolerance=1e-11)), {}),
    "kkt minres": (KKT(solver=MINRES(**TIGHT)), {"structure": HELD}),
    "fixed point": (FixedPoint(solver=GMRES(restart=60, **TIGHT)), {}),
    "fixed point, proximal": (FixedPoint(solver=GMRES(restart=60, **TIGHT)), {"structure": PROX}),
    "maid": (MAID().tight(20), {}),
    "lancbio": (LancBiO(dimension=10, products=10, residual=True), {}),
    "shine refined": (Shine(refine=CG(**TIGHT)), {"pairs": True}),
    "shine block": (Shine(memory=60, update="block"), {"pairs": True}),
    "single loop": (SingleLoop(lower_steps=2000, **SETTLED), {"draws": True}),
}


def ask(name, unused):
    """The answer on the first closed form, F with `unused` more, a function of y["unused"]."""
    case = closed_form(PROBLEMS[0], 0)
    estimator, options = ASKED[name]
    given: dict[str, Any] = {key: options[key] for key in options if key == "structure"}
    start = {"unused": torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)}
    y: Any = {**start, **case.y}

    def upper(x, y, batch):
        return case.problem.upper_loss(x, y, batch) + unused(y["unused"])

    if "pairs" in options:
        lower = case.problem.lower_loss
        begin = {**start, "y": case.y["y"] + 1}
        solver = LBFGS(steps=300, history=60)
        y = solve_lower(lower, case.x, begin, solver=solver, batch=case.lower_batch)
    if "draws" in options:
        given["batches"] = iter([case.upper_batch] * 2000), iter([case.lower_batch] * 2000)
    got = hypergradient(
        upper,
        case.problem.lower_loss,
        case.x,
        y,
        estimator=estimator,
        upper_batch=case.upper_batch,
        lower_batch=case.lower_batch,
        **given,
    )
    return case, got


@pytest.mark.parametrize("name", ASKED)
def test_they_stay_out_of_the_adjoint(name):
    """Where G is flat in them the system has no solution: no solver may be handed it."""
    case, got = ask(name, lambda unused: 50 * unused.sum())
    # L-BFGS leaves ‖∇y G‖ at 1e-8; pairs that span are good to 1e-5 (test_reuse)
    assert_close(got.hypergradient, case.truth, rtol=1e-5 if name == "shine block" else 1e-7)
    assert got.stats.converged or name == "shine block"
    _, plain = ask(name, lambda unused: 0.0 * unused.sum())
    assert got.stats.hvps == plain.stats.hvps, "they cost nothing either"
    assert got.stats.residual == plain.stats.residual, "nor are they left over"


def test_a_solver_that_is_handed_them_says_that_it_has_not_converged():
    """Negative control: the same system with ∇y F as it is."""
    case = closed_form(PROBLEMS[0], 0)
    A, idle = case.hessian(), torch.ones(3, dtype=torch.float64)
    b = {"unused": 50 * idle, "y": torch.ones(len(A), dtype=torch.float64)}

    def matvec(v):
        return {"unused": torch.zeros_like(idle), "y": A @ v["y"]}

    for solver in (CG(**TIGHT), MINRES(**TIGHT), Dense(), GMRES(restart=60, **TIGHT)):
        assert not solver.solve(matvec, b, tree.zeros_like(b)).stats.converged
