"""When an adjoint solve is good enough for the hypergradient, rather than for its own residual.

A fixed relative residual does not transfer between problems: what matters is (∂²xy G)ᵀ (v − v_k).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bilevel import tree
from bilevel.linear.cg import SolveProgress
from bilevel.linear.guards import resolution
from bilevel.types import Params

Memory = dict[str, float]
"""What is remembered from call to call: `ratio`, `smallest`, `size` and `steepest`, or nothing."""

MARGIN = 2.5
"""The estimate is one-sided, so it has to be this much below what is asked."""

FADES = 0.9
"""The ratio of earlier solves counts for this much of itself after one that saw another, and for
as much more after one that saw none: what was long not seen is trusted less."""

EXPLORED = 1e-6
"""The relative residual that a solve goes on to where no other went before."""

GROWS = 2.0
"""The smallest Ritz value of earlier solves counts for this much more after one that met others."""


class HoldsError:
    """Stops once the estimate of ‖h_k − h‖ is at most `error` ‖h_k‖, with h_k = ∇x F − Bᵀ v_k, B = ∂²xy G.

        ‖h_k − h‖ ≤ ratio · ‖v_k − A⁻¹b‖_A ≤ ratio · √(⟨r, M⁻¹ r⟩ / smallest), times MARGIN

    `smallest` is the smallest Ritz value of M⁻¹A seen, in this solve or before. `ratio` is the
    largest ‖Bᵀ (v_k − v_j)‖ / ‖v_k − v_j‖_A seen between two looks, whose denominator conjugate
    gradient gives at no product (Hestenes and Stiefel 1952, thm. 6:1). Both are estimates from one
    side: what lies in directions never met is not counted, nor how much B has grown since `ratio`
    was seen; a B that was not met at all is not believed to be zero. A look costs 1 cross product;
    the last one is the hypergradient itself. Looks come at 4 steps and half as many again each
    time, and where the figures of the last look say that it is enough.

    A solve that remembers nothing goes on to a relative residual of 1e-6, so that directions of
    little curvature are met that hold little of b and much of h. One that has come to where
    rounding alone exceeds what is asked stops, and `reached` stays False.

    Differs from a textbook's stopping rule in:

    1. It bounds the error of h = ∇x F − Bᵀ v and not the residual of v: one part of b in the
       kernel of Bᵀ costs nothing, and one along a flat direction is not treated as small.
    2. What it knows of A and B it has seen, in this solve or before, and what was seen before
       counts for less the longer ago: `FADES`, `GROWS`.
    3. It asks first and pays later: a look at h costs a cross product, so that between looks the
       figures of the last one decide whether another is worth it.
    """

    def __init__(self, error: float, h_of: Callable[[Params], Params], memory: Memory) -> None:
        self._error, self._h_of = error, h_of
        self._ratio, self._seen = memory.get("ratio", 0.0), 0.0
        self._smallest, self._met = memory.get("smallest", math.inf), math.inf
        self._size = memory.get("size", 0.0)
        self.steepest = memory.get("steepest", 0.0)
        """The largest curvature of A that this solve or one before has met."""
        self._step, self._at_step = 0, None
        self._next = 0 if memory else 4
        self._remembers = bool(memory)
        self.h: Params | None = None
        """The hypergradient where the solve was stopped."""
        self.reached = False
        self.estimate = math.inf

    def __call__(self, progress: SolveProgress) -> bool:
        self.steepest = max(self.steepest, progress.largest)
        if progress.last:
            return self._look(progress)
        if progress.steps < self._next:
            return False
        bound = self._bound(progress.rz)
        if math.isfinite(bound) and not (bound <= self._goal and self._explored(progress)):
            return False
        return self._look(progress)

    @property
    def memory(self) -> Memory:
        """For the next solve, with the same preconditioner."""
        ratio = max(self._seen, FADES * self._ratio) if self._seen else self._ratio / FADES
        met = math.isfinite(self._met)
        smallest = min(self._met, GROWS * self._smallest) if met else self._smallest
        if not (ratio > 0 and math.isfinite(ratio) and math.isfinite(smallest)):
            return {}
        kept = {"ratio": ratio, "smallest": smallest, "size": self._size}
        return {**kept, "steepest": self.steepest}

    @property
    def _goal(self) -> float:
        return self._error * self._size

    def _explored(self, progress: SolveProgress) -> bool:
        if self._remembers:
            return True
        return progress.r <= max(EXPLORED, 2 * resolution(progress.v)) * progress.size

    def _bound(self, rz: float) -> float:
        """The estimate at an iterate; infinite as long as a part of it is unknown."""
        ratio = max(self._ratio, self._seen)
        if ratio == 0 or not 0 < self._smallest < math.inf:
            return math.inf
        return MARGIN * ratio * math.sqrt(max(rz, 0.0) / self._smallest)

    def _look(self, progress: SolveProgress) -> bool:
        h = self._h_of(progress.v)
        self._size = tree.norm(h)
        if progress.steps:
            self._met = min(self._met, progress.ritz.smallest or math.inf)
            self._smallest = min(self._smallest, self._met)
        moved = progress.energy(self._step)
        if self._at_step is not None and moved > 0:
            change = tree.norm(tree.sub(h, self._at_step))
            if change > resolution(h) * self._size:  # or it says nothing of B
                self._seen = max(self._seen, change / math.sqrt(moved))
        self._step, self._at_step = progress.steps, h
        self._next = progress.steps + max(1, progress.steps // 2)
        self.estimate = self._bound(progress.rounded)
        self.reached = self.estimate <= self._goal and (progress.last or self._explored(progress))
        lost = self.estimate > self._goal >= self._bound(progress.rz)
        self.h = h if self.reached or lost or progress.last else None
        return self.h is not None
