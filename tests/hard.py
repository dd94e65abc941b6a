"""Spectra and systems that are hard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LARGE = 200_000


def symmetric(spectrum, seed=0):
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    A = (Q * torch.as_tensor(spectrum, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def vector(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64) + 0.5


def spread(n, condition):
    return torch.logspace(0, -math.log10(condition), n, dtype=torch.float64).tolist()


def contraction(n, seed=5):
    """I − M with ‖M‖ = 0.9, M of no symmetry."""
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) - 0.9 * M / torch.linalg.matrix_norm(M, 2)


@dataclass(frozen=True)
class System:
    """A v = b; A is a matrix, or the diagonal of one."""

    A: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor | None = None

    def times(self, v: torch.Tensor) -> torch.Tensor:
        return self.A @ v if self.A.dim() == 2 else self.A * v

    def off(self, v: torch.Tensor) -> float:
        """‖b − A v‖ / ‖b‖."""
        size = float(self.b.norm())
        return float((self.b - self.times(v)).norm()) / (size or 1.0)


def singular(inside):
    A = symmetric([0.0, *spread(9, 10)])
    return System(A, A @ vector(10) if inside else vector(10))
