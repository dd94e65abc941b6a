"""The Nyström preconditioner, and when it pays to build one."""

from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.preconditioners.nystrom import Nystrom
from bilevel.preconditioners.rebuild import RebuildRule
from bilevel.types import Point, System
from tests.adjoint.systems import matrix_of, seen_by
from tests.cases import PROBLEMS, closed_form
from tests.linear.systems import system


def test_patience_is_that_of_ski_rental():
    rule = RebuildRule()
    for spent in (9, 4, 6, 5):
        rule = rule.after(spent)
    assert (rule.fewest, rule.excess) == (4, 0 + 0 + 2 + 1)
    assert RebuildRule(0, 0).after(7).excess == 7
    assert rule.after(None) is rule


def test_nystrom_is_built_when_it_would_have_paid_and_is_exact_at_full_rank():
    case = closed_form(PROBLEMS[1], 0)
    made, A = seen_by(case)
    n = tree.size(case.y)
    chosen = Nystrom(rank=n)
    state = chosen.init(made.at)
    inverse, state = chosen.prepare(made, state)
    assert inverse is None, "nothing spent so far"
    inverse, state = chosen.prepare(replace(made, spent=n), state)
    assert inverse is None, "as much as it costs"
    before = dict(state)
    inverse, state = chosen.prepare(replace(made, spent=1), state)
    assert inverse is not None
    assert before["built"] == 0
    M = matrix_of(inverse, made.b)
    values = torch.linalg.eigvalsh((M @ A + (M @ A).T) / 2)
    # rounding of the sketch, relative to ‖A‖, times the condition number
    assert float(values[-1] / values[0]) == pytest.approx(1, abs=1e-3)


def test_nystrom_keeps_to_its_memory_and_leaves_indefinite_matrices_alone():
    case = closed_form(PROBLEMS[1], 0)
    made, _ = seen_by(case, spent=1000)
    few = Nystrom(memory=8.0 * 40 * 5)
    assert few.prepare(made, few.init(made.at))[1]["U"].shape == (40, 5)
    upside = replace(made, matvec=lambda v: tree.scale(-1.0, made.matvec(v)))
    chosen = Nystrom(rank=10)
    inverse, state = chosen.prepare(upside, chosen.init(made.at))
    assert inverse is None
    assert state["refused"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_nystrom_is_built_where_A_has_less_rank_than_asked_for(seed):
    """The core matrix is then singular, and has a factor only for the shift by rounding."""
    spectrum = [0.0] * 35 + [1.0, 2.0, 3.0, 4.0, 5.0]
    matvec, A, b = system(spectrum, seed)
    chosen = Nystrom(rank=20, seed=seed)
    made = System(matvec, b, None, None, 0.0, 1000)
    inverse, state = chosen.prepare(made, chosen.init(Point({}, b)))
    assert (state["built"], state["refused"]) == (1, 0)
    assert inverse is not None
    found = state["U"] @ state["values"].diag() @ state["U"].T
    # what is dropped of A is of the size of the shift, eps times the norm of the sketch
    torch.testing.assert_close(found, A, rtol=0, atol=1e-12)
