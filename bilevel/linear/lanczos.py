"""The eigenvalues that the coefficients of a Krylov solve hold. Golub and Meurant (2010), ch. 4."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from bilevel.scalars.functions import call, sqrt


@dataclass
class Tridiagonal:
    """The Lanczos matrix that conjugate gradient's coefficients hold, and its eigenvalues."""

    diagonal: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    """What each step took from ‖v − A⁻¹b‖² in the norm of A."""
    _last: tuple[float, float] = (math.inf, 0.0)
    _values: list[float] = field(default_factory=list)

    def append(self, alpha: float, beta: float, rz: float = 0.0) -> None:
        """Add one step: its length alpha, the ratio beta of ⟨r, M⁻¹ r⟩ after and before, that before."""
        self.energies.append(alpha * rz)
        previous_alpha, previous_beta = self._last
        self.diagonal.append(1 / alpha + previous_beta / previous_alpha)
        self.off.append(sqrt(beta) / alpha)
        self._last = (alpha, beta)

    def ritz(self) -> list[float]:
        """Ritz values in ascending order. Cubic in the steps, so found once for them all."""
        if len(self._values) < len(self.diagonal):
            self._values = call(_eigenvalues, *self.diagonal, *self.off[:-1])
        return self._values

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound of ‖A‖; 0 before the first step."""
        return self.ritz()[-1] if self.diagonal else 0.0

    @property
    def condition(self) -> float | None:
        """Largest over smallest Ritz value, or None where the smallest is not positive."""
        if not self.diagonal:
            return None
        values = self.ritz()
        return values[-1] / values[0] if values[0] > 0 else None

    @property
    def smallest(self) -> float | None:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return self.ritz()[0] if self.diagonal else None


def _eigenvalues(*entries: float) -> list[float]:
    """Of a symmetric tridiagonal matrix: n numbers on its diagonal, then n − 1 beside it."""
    n = (len(entries) + 1) // 2
    # its lower triangle; by NumPy, which for a few steps costs a tenth of torch's calls
    lower = np.diag(entries[:n]) + np.diag(entries[n:], -1)
    return np.linalg.eigvalsh(lower).tolist()
