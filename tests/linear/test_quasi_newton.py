"""Quasi-Newton inverses from given pairs, against their updates typed out."""

import pytest
import torch

from bilevel import tree
from bilevel.linear.dense import matrix
from bilevel.linear.quasi_newton import bfgs, block
from tests.cases import assert_close


def random_pairs(dim, count, seed=0):
    """(A, pairs of random steps and their products with a symmetric positive definite A)"""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    A = root @ root.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    steps = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return A, [({"a": s[:2], "b": s[2:]}, {"a": (A @ s)[:2], "b": (A @ s)[2:]}) for s in steps]


def as_matrix(invert, like):
    return matrix(invert, like)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_bfgs_is_its_update_typed_out(count):
    _, pairs = random_pairs(7, count)
    like = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    eye = torch.eye(7, dtype=torch.float64)
    H = eye
    if pairs:
        s, c = (tree.flatten(part) for part in pairs[-1])
        H = (s @ c) / (c @ c) * eye
    for pair in pairs:
        s, c = (tree.flatten(part)[:, None] for part in pair)
        rho = 1 / (s.T @ c)
        H = (eye - rho * s @ c.T) @ H @ (eye - rho * c @ s.T) + rho * s @ s.T
    torch.testing.assert_close(as_matrix(bfgs(pairs), like), H, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 12])
def test_block_satisfies_every_secant_equation(count):
    A, pairs = random_pairs(7, count)
    like = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    inverse = as_matrix(block(pairs), like)
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    for s, c in pairs:
        assert_close(block(pairs)(c), s, rtol=1e-7)
    if count >= 7:
        torch.testing.assert_close(inverse, torch.linalg.inv(A), rtol=1e-7, atol=1e-7)
    else:
        assert float((inverse - torch.linalg.inv(A)).norm()) > 0.1


def test_bfgs_keeps_only_the_last_secant_equation():
    """Negative control, and the reason that block exists."""
    _, pairs = random_pairs(7, 7)
    assert_close(bfgs(pairs)(pairs[-1][1]), pairs[-1][0], rtol=1e-10)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(bfgs(pairs)(pairs[0][1]), pairs[0][0], rtol=1e-2)
