"""First-order MAML. Finn, Abbeel and Levine (2017), arXiv:1703.03400, sec. 5.2."""

from __future__ import annotations

import math
from typing import Any, Literal

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.types import Estimate, Losses, Needs, Point, Stats
from bilevel.unrolling.path import pull_start, recorded_from_x


@component
class FOMAML:
    """∇x F(x, y_K) + (∂y_0/∂x)ᵀ ∇y F(x, y_K): MAML with the identity for ∂y_K/∂y_0.

    Drops the Hessians of the lower steps, and how they depend on x but through the start: off the
    derivative of F(x, y_K(x)) by O(lr · K). Costs 1 gradient.

    Raises:
        ProblemError: the lower level does not start at a function of x.
    """

    @property
    def needs(self) -> Needs:
        start = frozenset({"lower_start"})
        return Needs(second_order=False, path=math.inf, requires=start)

    @property
    def claim(self) -> Literal["path"] | None:
        return None

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        path = recorded_from_x(at, "fomaml")
        value, F_x, F_y = calculus.gradients(losses.upper, at)
        h = tree.axpy_(F_x, 1.0, pull_start(path, losses.lower, at.x, F_y))
        return Estimate(h, value, state, Stats(iterations=len(path.batches)))
