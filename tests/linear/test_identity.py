"""The identity in place of the inverse."""

import torch

from bilevel import tree
from bilevel.linear.identity import Identity
from bilevel.linear.neumann import Neumann
from tests.linear.systems import system, zero


def test_identity_keeps_an_acute_angle_on_a_contraction():
    matvec, A, b = system([0.6, 0.8, 1.0, 1.2, 1.4], 0)
    truth = torch.linalg.solve(A, tree.flatten(b))
    got = tree.flatten(Identity().solve(matvec, b, zero(b)).solution)
    assert float(got @ truth) / float(got.norm() * truth.norm()) > 0.9
    first = Neumann(iterations=1, scale=0.7).solve(matvec, b, zero(b)).solution
    scaled = Identity(scale=0.7).solve(matvec, b, zero(b)).solution
    torch.testing.assert_close(tree.flatten(scaled), tree.flatten(first))
