"""Whether first-order steps diverge, from the values and gradient norms that they compute anyway."""

from __future__ import annotations

from bilevel.errors import ConvergenceError
from bilevel.scalars.functions import larger

BURN_IN = 4
"""Steps that set the scale: Adam leaves a point of rest by as much as its lr, within a few steps."""
LIMIT = 1e3
"""Growth of ‖∇y G‖ beyond the burn-in that no descent explains, where G has grown as well."""


class Growth:
    """G and ‖∇y G‖ along a lower solve: their largest in the burn-in, and the last two."""

    def __init__(self) -> None:
        self._seen = 0
        self._largest_value, self._largest_norm = float("-inf"), 0.0
        self._value, self._norm, self._before = float("nan"), float("nan"), float("nan")

    def note(self, value: float, norm: float) -> None:
        """What one step evaluated."""
        if self._seen < BURN_IN:
            self._largest_value = larger(self._largest_value, value)
            self._largest_norm = larger(self._largest_norm, norm)
        self._seen += 1
        self._value, self._before, self._norm = value, self._norm, norm

    def refuse_divergence(self) -> None:
        """Raise `ConvergenceError` where the solve ended far above where it began.

        Gradient descent on a quadratic multiplies the gradient by lr L − 1 a step in the end, L
        the largest curvature: 2 / (1 + that factor) is what takes lr to the bound of 2 / L.
        """
        if not (self._norm > LIMIT * self._largest_norm and self._value > self._largest_value):
            return
        factor = self._norm / self._before
        # it says something of the curvature only where the last step was one of the growth
        bound = (
            ", by gradient descent's bound (2 / largest curvature) at most "
            f"{2 / (1 + factor):.2g} times the present one"
        )
        raise ConvergenceError(
            f"the lower steps diverge: in {self._seen} of them lower_loss went to {self._value:.1e} "
            f"and ‖∇y G‖ to {self._norm:.1e}, by a factor of {factor:.2g} in the last; take a smaller "
            f"lower.optimizer.lr{bound if factor > 1 else ''}, or lower: lbfgs, which needs none"
        )
