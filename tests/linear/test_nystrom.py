"""The Nyström approximation of the inverse."""

import torch

from bilevel import tree
from bilevel.linear.nystrom import Nystrom
from tests.linear.systems import system, zero


def test_nystrom_is_exact_at_full_rank_and_improves_with_rank():
    """A Hessian of rank 5 in 20 dimensions, damped: 5 random columns already span it."""
    spectrum = [0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 5.0]
    matvec, A, b = system(spectrum, 1)
    rho = 0.1
    truth = torch.linalg.solve(A + rho * torch.eye(20, dtype=torch.float64), tree.flatten(b))

    def off(rank):
        got = tree.flatten(Nystrom(rank=rank, rho=rho).solve(matvec, b, zero(b)).solution)
        return float((got - truth).norm() / truth.norm())

    assert off(20) < 1e-9
    assert off(5) < 1e-8
    assert off(4) > 1e-3  # control: one column short
    assert off(2) > off(4)
