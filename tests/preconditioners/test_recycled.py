"""Directions recycled from the solves before."""

import pytest
import torch

from bilevel import tree
from bilevel.linear.cg import CG, PairSelection
from bilevel.preconditioners.recycled import Recycled
from bilevel.types import System
from tests.adjoint.systems import matrix_of
from tests.cases import relative
from tests.linear.systems import log_spectrum, run_cg, system


def pairs_of(A, b, solver):
    kept = PairSelection(1000)
    run_cg(solver, lambda v: tree.unflatten(A @ tree.flatten(v), b), b, observe=kept.offer)
    return kept.pairs


def test_recycled_pairs_are_mapped_back_and_leave_little_to_do():
    matvec, A, b = system(log_spectrum(30, 1e4), 0)
    pairs = pairs_of(A, b, CG(iterations=8, tolerance=0.0))
    state = Recycled().learn({}, pairs)
    made = System(matvec, b, None, None, 0.0, 8)
    inverse, same = Recycled().prepare(made, state)
    assert same is state
    for p, Ap in pairs:
        assert relative(inverse(Ap), p) < 1e-6
    M = matrix_of(inverse, b)
    assert float((M - M.T).norm() / M.norm()) < 1e-10
    assert float(torch.linalg.eigvalsh((M + M.T) / 2)[0]) > 0
    for other in pairs_of(A, tree.map(torch.ones_like, b), CG(iterations=1, tolerance=0.0)):
        assert relative(inverse(other[1]), other[0]) > 1e-3, "not what was never seen"


def test_recycled_pairs_age_out_at_the_room_there_is():
    _, A, b = system(log_spectrum(30, 10), 0)
    chosen = Recycled(pairs=10)
    state = chosen.learn({}, pairs_of(A, b, CG(iterations=7, tolerance=0.0)))
    oldest = state["rows of S"][:, :4].clone()
    kept = {name: part.clone() for name, part in state.items()}
    more = chosen.learn(
        state, pairs_of(A, tree.map(torch.ones_like, b), CG(iterations=7, tolerance=0))
    )
    assert more["rows of S"].shape == (30, 10)
    torch.testing.assert_close(more["rows of S"][:, :3], state["rows of S"][:, 4:], rtol=0, atol=0)
    torch.testing.assert_close(
        more["M"], more["rows of S"].T @ more["rows of C"], rtol=1e-9, atol=1e-12
    )
    assert all(torch.equal(kept[name], state[name]) for name in kept), "the state was written into"
    assert oldest.shape == (30, 4)
    assert chosen.learn(state, []) is state
    assert Recycled(memory=2 * 8.0 * 30 * 6).room(b) == 6


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_recycled_directions_without_curvature_are_left_out(factor):
    b = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    first = {"y": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    second = {"y": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    state = Recycled().learn({}, [(second, tree.scale(factor, second)), (first, first)])
    inverse, _ = Recycled().prepare(System(lambda v: v, b, None, None, 0.0, None), state)
    M = matrix_of(inverse, b)
    assert bool(torch.isfinite(M).all())
    assert float(torch.linalg.eigvalsh((M + M.T) / 2)[0]) > 0
