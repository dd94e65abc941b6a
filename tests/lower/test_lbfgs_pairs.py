"""The pairs that an L-BFGS lower solve leaves."""

import pytest
import torch

from bilevel import tree
from bilevel.functional import solve_lower
from bilevel.lower.lbfgs import LBFGS
from tests.cases import NAMES, PROBLEMS, assert_close, closed_form, offset
from tests.estimators.pairs import WELL, solved


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
    assert len(many.pairs) == many.stats.gradients - 2 > 10  # one of the first, for the scale of G
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
    assert len(found.pairs) < found.stats.gradients - 2
    assert all(tree.dot(s, c) > 0 for s, c in found.pairs)
