"""The two updates of conjugate gradient that a step consists of beside its product."""

import pytest
import torch

from bilevel import tree
from bilevel.linear import cg


def vectors(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "a": torch.randn(3, 2, generator=draw).to(dtype),
            "b": torch.randn((), generator=draw).to(dtype),
        }
        for _ in range(4)
    ]


@pytest.mark.parametrize("by_entry", [True, False], ids=["by entry", "foreach"])
def test_a_step_of_a_solver_is_the_formula(by_entry):
    """Both ways of it: the one for GPUs runs on any device."""
    v, r, p, Ap = vectors()
    given = [tree.clone(params) for params in (v, r, p, Ap)]
    left = tree.sub(r, tree.scale(0.3, Ap))
    before = r["a"]
    assert cg._update_residual(r, 0.3, Ap, by_entry) == pytest.approx(
        tree.dot(left, left), rel=1e-14
    )
    cg._update_direction(v, 0.7, p, -2.0, r, by_entry)
    assert tree.norm(tree.sub(r, left)) < 1e-15
    assert tree.norm(tree.sub(v, tree.axpy(0.7, given[2], given[0]))) < 1e-15
    assert tree.norm(tree.sub(p, tree.axpy(-2.0, given[2], left))) < 1e-14
    assert torch.equal(before, given[1]["a"]), "whoever holds the old residual keeps it"
    assert torch.equal(Ap["a"], given[3]["a"])


def test_a_step_sums_bfloat16_in_float32():
    r = {"a": torch.ones(1000, dtype=torch.bfloat16)}
    assert (
        cg._update_residual(r, 0.0, r, cg._on_cpu(r)) == 1000.0
    )  # in bfloat16 the sum stops at 256


def test_a_step_of_nothing():
    by_entry = cg._on_cpu({})
    assert cg._update_residual({}, 1.0, {}, by_entry) == 0.0
    cg._update_direction({}, 1.0, {}, 1.0, {}, by_entry)
