"""The directions of one call, with what they remember and the points they were last taken at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.directions.oracles import Batches, Draw, Oracle, Triple
from bilevel.directions.quantity import Direction
from bilevel.types import Estimate, Moved, Params, Stats


class DirectionTracker:
    """Hands each quantity to its direction, and keeps the evidence. Never writes into `state`.

    A tolerance of 0 asks for no evidence of rest, which would cost a synchronisation.
    """

    def __init__(
        self, directions: Mapping[str, Direction], state: Mapping[str, Any], tolerance: float
    ) -> None:
        self._directions = directions
        self._memory, self._before = dict(state["memory"]), dict(state["before"])
        self._calls: int = state["calls"]
        self._tolerance = tolerance
        self._upper_gradients: dict[tuple[int, int], Any] = {}
        self._left: dict[str, float] = {}
        self._lower: tuple[float, float] = (math.nan, math.nan)
        self._value: Tensor | None = None
        self._upper: Params | None = None

    def oracle(self, place: str, sample: Batches, at: Triple, *wanted: str) -> Oracle:
        """The quantities at a point, which becomes the one before for the next call at `place`."""
        kept = self._before.get(place)
        previous = Triple(**kept) if kept else at
        if any(self._directions[quantity].looks_back for quantity in wanted):
            self._before[place] = at.save()
        return Oracle(sample, at, previous, wanted, self._upper_gradients)

    def take(self, quantity: str, oracle: Oracle) -> Params:
        """The direction of a quantity; its memory goes on."""
        memory = self._memory.get(quantity, {})
        draw = Draw(oracle, quantity)
        d, self._memory[quantity] = self._directions[quantity].take(draw, memory)
        found = oracle.latest
        if quantity == "lower":
            self._lower = found.G.item(), tree.norm(d)
            self._left["lower"] = self._lower[1]
        if quantity == "adjoint" and self._tolerance:
            right = tree.norm(found.lower["right"])
            self._left["adjoint"] = tree.norm(d) / (right or 1.0)
        if quantity == "upper":
            if self._tolerance and self._upper is not None:
                # an average lags behind y and v: it rests once it no longer changes
                step = tree.norm(tree.sub(d, self._upper))
                self._left["upper"] = step / (tree.norm(d) or 1.0)
            self._value, self._upper = found.F, d
        return d

    def rests(self, *quantities: str) -> bool:
        """Whether the directions of these quantities have fallen to the tolerance."""
        if not self._tolerance:
            return False
        return all(self._left.get(q, math.inf) <= self._tolerance for q in quantities)

    def estimate(self, hypergradient: Params, at: Triple, steps: int) -> Estimate:
        """The upper direction with y where it was moved to, v and the memories."""
        assert self._value is not None
        state = {
            "calls": self._calls + 1,
            "v": at.v,
            "memory": self._memory,
            "before": self._before,
        }
        stats = Stats(iterations=steps, stopped="iterations")
        if self._tolerance and "adjoint" in self._left:
            settled = self.rests(*self._left)
            stopped = "tolerance" if settled else "iterations"
            left = self._left["adjoint"]
            stats = replace(stats, residual=left, converged=settled, stopped=stopped)
        if self._memory["upper"]:  # which may hold it, and who asked may clip it in place
            hypergradient = tree.clone(hypergradient)
        moved = Moved(at.y, *self._lower, steps)
        return Estimate(hypergradient, self._value, state, stats, moved)
