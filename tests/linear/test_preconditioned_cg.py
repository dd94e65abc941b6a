"""Conjugate gradient with a preconditioner, an observer, and a bound on what it keeps."""

import gc
import itertools
import math

import pytest
import torch

from bilevel import calculus, hypergradient, tree
from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG, PairSelection
from bilevel.linear.gmres import GMRES
from tests.linear.systems import log_spectrum, run_cg, system, zero


def inverse_of(A, like):
    return lambda r: tree.unflatten(torch.linalg.solve(A, tree.flatten(r)), like)


def test_the_true_inverse_leaves_one_step():
    matvec, A, b = system(log_spectrum(30, 1e6), 0)
    exact = run_cg(CG(iterations=50, tolerance=1e-10), matvec, b, precondition=inverse_of(A, b))
    assert exact.stats.iterations == 1
    assert exact.stats.converged
    assert CG(iterations=50, tolerance=1e-10).solve(matvec, b, zero(b)).stats.iterations > 30


@pytest.mark.parametrize("seed", range(3))
def test_a_preconditioner_changes_the_way_and_not_the_end(seed):
    matvec, A, b = system(log_spectrum(40, 1e4), seed)
    truth = torch.linalg.solve(A, tree.flatten(b))
    d = tree.unflatten(A.diagonal(), b)
    got = run_cg(
        CG(iterations=500, tolerance=1e-11), matvec, b, precondition=lambda r: tree.div(r, d)
    )
    error = float((tree.flatten(got.solution) - truth).norm() / truth.norm())
    assert error <= 1e4 * 1e-11
    scaled = A / torch.outer(A.diagonal(), A.diagonal()).sqrt()
    values = torch.linalg.eigvalsh(scaled)
    assert got.stats.condition == pytest.approx(float(values[-1] / values[0]), rel=0.02)


def test_an_indefinite_matrix_is_seen_through_a_preconditioner():
    matvec, _, b = system([-0.5, *log_spectrum(20, 10)], 0)
    d = tree.map(lambda p: torch.full_like(p, 2.0), b)
    got = run_cg(CG(iterations=100), matvec, b, precondition=lambda r: tree.div(r, d))
    assert got.stats.curvature <= 0
    assert got.stats.converged is False
    assert tree.is_finite(got.solution)


def test_the_energy_of_the_steps_is_the_distance_they_went():
    """Hestenes and Stiefel (1952), thm. 6:1: ‖v_k − v_j‖² in the norm of A, at no product."""
    matvec, _, b = system(log_spectrum(20, 100), 1)
    seen = []

    def look(progress):
        if progress.steps in (3, 9):
            seen.append((tree.clone(progress.v), progress))
        if progress.steps == 9:
            move = tree.sub(seen[1][0], seen[0][0])
            true = tree.dot(move, matvec(move))
            assert progress.energy(3) == pytest.approx(true, rel=1e-9)
            assert progress.energy(4) != pytest.approx(true, rel=1e-2)
        return progress.steps == 9

    run_cg(CG(iterations=50, tolerance=0.0), matvec, b, stop=look)
    assert len(seen) == 2


@pytest.mark.parametrize("steps", [3, 16, 50])
def test_a_sample_is_even_and_no_larger_than_its_room(steps):
    kept = PairSelection(8)
    for k in range(steps):
        kept.offer({"p": torch.tensor([float(k)])}, {"p": torch.zeros(1)})
    chosen = [int(p["p"]) for p, _ in kept.pairs]
    assert len(chosen) <= 8
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert gaps <= {max(1, 2 ** math.ceil(math.log2(steps / 8)))}, chosen
    assert chosen[0] == 0


@pytest.mark.parametrize("room", [0, 1])
def test_a_sample_with_no_room_keeps_one_pair(room):
    """The first, whatever comes after; a room of 0 is one of 1."""
    kept = PairSelection(room)
    for step in range(9):
        kept.offer({"p": torch.tensor(float(step))}, {"p": torch.tensor(0.0)})
    assert [float(p["p"]) for p, _ in kept.pairs] == [0.0]


class Counted:
    """How many vectors of the size of y are alive in Python at each product."""

    SIZE = 1009

    def __init__(self, product):
        self.product, self.alive = product, []

    def __call__(self, linearization, vector):
        gc.collect()
        storages = {
            found.untyped_storage().data_ptr()
            for found in gc.get_objects()
            if type(found) is torch.Tensor and found.numel() == self.SIZE
        }
        self.alive.append(len(storages))
        return self.product(linearization, vector)


def kept_by(solver, monkeypatch):
    """Vectors alive at the product where there are most, with those of the problem left out."""
    counted = Counted(calculus.Linearization.hvp_yy)
    monkeypatch.setattr(calculus.Linearization, "hvp_yy", lambda self, v: counted(self, v))
    d = torch.linspace(1, 50, Counted.SIZE, dtype=torch.float64)

    def upper_loss(x, y, batch):
        return y["y"].square().sum()

    def lower_loss(x, y, batch):
        return 0.5 * (d * y["y"].square()).sum() - x["x"] * y["y"].sum()

    gc.collect()
    gc.freeze()  # so that looking at what is new takes no time; d among what is not looked at
    try:
        x, y = {"x": torch.tensor(2.0, dtype=torch.float64)}, {"y": 1 / d}
        hypergradient(upper_loss, lower_loss, x, y, estimator=Implicit(solver=solver))
    finally:
        gc.unfreeze()
    assert len(counted.alive) == 6
    return max(counted.alive) - 1  # y


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_conjugate_gradient_keeps_three_vectors_and_the_gradient(monkeypatch):
    """v, r and p; neither the right-hand side nor the start, nor the last product."""
    assert kept_by(CG(iterations=6, tolerance=0.0), monkeypatch) == 3 + 1


@pytest.mark.untrusted("ends its adjoint solve early on purpose")
def test_gmres_keeps_its_basis(monkeypatch):
    assert kept_by(GMRES(iterations=6), monkeypatch) > 6
