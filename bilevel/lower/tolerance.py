"""Where a lower solve stops: at an absolute ‖∇y G‖, or at one relative to the scales of G and y.

    ‖∇y G‖ ≤ relative · L · ‖y‖,    L the curvature of G that the solver meets,

asks y to be right to that part of its size, times the condition number at worst: whatever the scale
of G, and of a warm start no more than of a cold one, since neither side falls as the start gets
better. (Relative to ‖∇y G‖ at the start, a warm start would be asked for what rounding forbids.)
"""

from __future__ import annotations

from typing import Any

from bilevel import calculus, tree
from bilevel.errors import ConvergenceError
from bilevel.types import Loss, Params

ROUNDING = 10
"""Multiples of the dtype's eps below which no relative tolerance is read: nothing could meet it."""

NOISE = 100
"""Multiples of eps ‖∇y G‖ below which a difference of gradients is rounding."""


class Stop:
    """The tolerance of one lower solve; an absolute one stands in the place of a relative one.

    Keeps in the solver's state the largest ‖y‖ at which a solve began or ended, for a y that goes to
    0, and the curvature that the last one met, which says where a warm start stands at no cost.
    """

    def __init__(
        self, absolute: float | None, relative: float | None, state: Any, y: Params
    ) -> None:
        self._absolute, self._relative = absolute, relative
        self._size: float = max(state.get("size", 0.0), tree.norm(y))
        self.curvature: float = state.get("curvature", 0.0)
        """L: what the solver sets it to as it goes, at first what `begin` finds."""

    @property
    def is_relative(self) -> bool:
        return self._absolute is None and self._relative is not None

    def begin(self, loss: Loss, x: Params, y: Params, g: Params) -> int:
        """Look along ∇y G = g for the curvature, unless a solve before has; gradients that it took."""
        if self.curvature:
            return 0
        self.curvature = curvature_along(loss, x, y, g)
        return 1

    def is_met(self, norm: float, y: Params) -> bool:
        """Whether ‖∇y G‖ = norm at y is small enough."""
        if self._absolute is not None:
            return norm <= self._absolute
        if self._relative is None:
            return False
        least = max(self._relative, ROUNDING * tree.eps(y))
        return norm <= least * self.curvature * max(self._size, tree.norm(y))

    def state(self, y: Params) -> dict[str, float]:
        """What the next solve goes on with, this one having ended at y."""
        return {"size": max(self._size, tree.norm(y)), "curvature": self.curvature}


def curvature_along(loss: Loss, x: Params, y: Params, g: Params) -> float:
    """‖∇y G(x, y + δ) − g‖ / ‖δ‖ for a small δ along −g; 0 where that says nothing. 1 gradient."""
    norm = tree.norm(g)
    if not norm:
        return 0.0
    length = tree.eps(y) ** 0.5 * (tree.norm(y) or 1.0)
    there = tree.axpy(-length / norm, g, y)
    shift = tree.norm(tree.sub(there, y))
    try:
        _, after = calculus.gradient_y(loss, x, there)
    except ConvergenceError:
        return 0.0  # G ends there; the steps will say so if they need to go on
    change = tree.norm(tree.sub(after, g))
    if not shift or not NOISE * tree.eps(y) * norm < change < float("inf"):
        return 0.0
    return change / shift
