"""Single-loop stochastic methods: y, the adjoint v and x each take a step along a direction.

SOBA and SABA: Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409, alg. 1. The methods
before and after it are other orders, adjoints and directions; they are presets. Truncated series:
Ghadimi and Wang (2018), arXiv:1802.02246, alg. 3; Ji, Yang and Liang (2021), arXiv:2010.07962,
alg. 3.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from bilevel import rng, tree
from bilevel.components import Slot, component
from bilevel.directions.oracles import Batches, Series, Triple
from bilevel.directions.plain import Plain
from bilevel.directions.quantity import Direction
from bilevel.directions.tracker import DirectionTracker
from bilevel.errors import ProblemError
from bilevel.scalars.functions import call
from bilevel.types import Estimate, Loss, Losses, Needs, Params, Point

TIGHT = 5000
"""Steps of `tight`, enough at a step size of 1 / L for a condition number of some hundreds."""


@component
class SingleLoop:
    """y ← y − lower_lr d_y, v ← v − adjoint_lr d_v and the upper direction d_x, from directions d of

        ∇y G(x, y),    ∂²yy G(x, y) v − ∇y F(x, y),    ∇x F(x, y) − (∂²xy G(x, y))ᵀ v.

    `order: together` evaluates the three at one point (x, y, v) on one batch of G and one of F,
    `lower_steps` times with x held, and returns the last d_x. `sequential` takes `lower_steps`
    steps of y, then `adjoint_steps` of v at the new y, then d_x at both, each step on a batch of G
    of its own and all on one batch of F. The step of x is the upper optimizer's; `sgd` is what
    the papers have. The lower solver of the recipe is not used.

    `adjoint: steps` keeps v from call to call. `series` is v = lr Σ_{q ≤ K} Π (I − lr ∂²yy G) ∇y F
    with K = adjoint_steps factors on a batch each; `random_series` draws p from 0 … K − 1 and is
    v = K lr Π_{p factors}: their means are the series truncated after K, after K − 1.

    Exact for dΦ/dx with `steps`, where y and v have settled; a series is off by O((1 − lr μ)^K),
    μ the smallest eigenvalue of ∂²yy G. Gradients, HVPs and cross products a call with `plain`
    directions, T = lower_steps, K = adjoint_steps: `together` 2 T, T, T, with a series
    (2 + K) T, K T, T; `sequential` T + K + 2, K, 1. `storm` and `spider` evaluate twice. With a
    `tolerance` a loop ends early where ‖d_y‖, ‖d_v‖ / ‖∇y F‖ and the relative change of d_x are at
    most that, and the stats say whether they are. Raises `ProblemError` where y is restricted to a set,
    or a direction needs to know the blocks of the data and does not; `ConvergenceError` where three
    factors of a series in a row make its term longer.
    """

    order: Literal["together", "sequential"] = "together"
    lower_lr: PositiveFloat = 0.1
    lower_steps: PositiveInt = 1
    adjoint: Literal["steps", "series", "random_series"] = "steps"
    adjoint_lr: PositiveFloat = 0.1
    adjoint_steps: PositiveInt = 1
    lower_direction: Annotated[Direction, Slot("directions")] = Field(default_factory=Plain)
    adjoint_direction: Annotated[Direction, Slot("directions")] = Field(default_factory=Plain)
    upper_direction: Annotated[Direction, Slot("directions")] = Field(default_factory=Plain)
    tolerance: NonNegativeFloat = 0.0
    seed: int = 0

    @model_validator(mode="after")
    def _adjoint_fits(self) -> Self:
        if self.adjoint == "steps" and self.order == "together" and self.adjoint_steps != 1:
            raise ValueError(
                "order: together steps v with y, lower_steps times; adjoint_steps is for order: "
                "sequential and for a series"
            )
        if self.adjoint != "steps" and self.adjoint_direction != Plain():
            raise ValueError("a series has no direction: adjoint_direction is for adjoint: steps")
        return self

    @cached_property
    def needs(self) -> Needs:
        one = self.order == "together" and self.lower_steps == 1 and self.adjoint == "steps"
        by_block = any(direction.by_block for direction in self._directions.values())
        return Needs(fresh=not one or by_block, moves_lower=True)

    @property
    def claim(self) -> Literal["solution"] | None:
        return "solution" if self.adjoint == "steps" else None

    def tight(self, dim: int) -> SingleLoop:
        """The same with y and v settled at x, where its claim can be tested.

        There is one batch then, and `plain` in the place of what takes it for one of many.
        """
        directions = {
            f"{name}_direction": Plain() if direction.by_block else direction
            for name, direction in self._directions.items()
        }
        steps = {"lower_steps": TIGHT, "tolerance": 1e-9}
        if self.order == "sequential":
            steps["adjoint_steps"] = TIGHT
        return replace(self, **directions, **steps)

    @cached_property
    def _directions(self) -> dict[str, Direction]:
        return {
            "lower": self.lower_direction,
            "adjoint": self.adjoint_direction,
            "upper": self.upper_direction,
        }

    def init(self, at: Point) -> dict[str, Any]:
        return {"calls": 0, "v": tree.zeros_like(at.y), "memory": {}, "before": {}}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        if losses.lower.structure.project is not None:
            raise ProblemError(
                "single_loop knows no set that restricts y, neither in its steps nor in its adjoint; "
                "use estimator: unroll, which projects after each step"
            )
        tracker, start = (
            DirectionTracker(self._directions, state, self.tolerance),
            Triple(at.x, at.y, state["v"]),
        )
        go = self._together if self.order == "together" else self._sequential
        return go(losses.upper, losses.lower, tracker, start, state["calls"])

    def _together(
        self, F: Loss, G: Loss, tracker: DirectionTracker, at: Triple, calls: int
    ) -> Estimate:
        moving = ("lower", "adjoint") if self.adjoint == "steps" else ("lower",)
        steps, h = 0, at.x
        while steps < self.lower_steps and not tracker.rests(*moving, "upper"):
            if steps:
                F, G = F.fresh(), G.fresh()
            sample = self._sample(F, G, calls, steps)
            oracle = tracker.oracle("together", sample, at, *moving, "upper")
            d = {quantity: tracker.take(quantity, oracle) for quantity in moving}
            h = tracker.take("upper", oracle)
            at, steps = self._stepped(at, **d), steps + 1
        return tracker.estimate(h, at, steps)

    def _sequential(
        self, F: Loss, G: Loss, tracker: DirectionTracker, at: Triple, calls: int
    ) -> Estimate:
        steps = 0
        while steps < self.lower_steps and not tracker.rests("lower"):
            G = G.fresh() if steps else G
            d = tracker.take("lower", tracker.oracle("lower", Batches([G], []), at, "lower"))
            at, steps = self._stepped(at, lower=d), steps + 1
        for _ in range(self.adjoint_steps if self.adjoint == "steps" else 0):
            sample = Batches([G.fresh()], [F])
            d = tracker.take("adjoint", tracker.oracle("adjoint", sample, at, "adjoint"))
            at = self._stepped(at, adjoint=d)
            if tracker.rests("adjoint"):
                break
        sample = self._sample(F, G.fresh(), calls)
        h = tracker.take("upper", tracker.oracle("upper", sample, at, "upper"))
        return tracker.estimate(h, at, steps)

    def _stepped(self, at: Triple, **d: Params) -> Triple:
        y = tree.axpy(-self.lower_lr, d["lower"], at.y) if "lower" in d else at.y
        v = tree.axpy(-self.adjoint_lr, d["adjoint"], at.v) if "adjoint" in d else at.v
        return Triple(at.x, y, v)

    def _sample(self, F: Loss, G: Loss, calls: int, step: int = 0) -> Batches:
        """The batches of the upper direction, with those of the series where there is one."""
        if self.adjoint == "steps":
            return Batches([G], [F])
        count, series = self.adjoint_steps, Series(self.adjoint_lr, 1.0, True)
        if self.adjoint == "random_series":
            series = Series(self.adjoint_lr, float(count), False)
            count = call(_factors, self.seed, calls, step, count)
        return Batches([G], [F], [[G.fresh()] for _ in range(count)], series)


def _factors(seed: int, calls: int, step: int, most: int) -> int:
    """How many factors a random series has: from 0 to most − 1."""
    stream = rng.stream(seed, f"series.{calls}.{step}")
    return int(torch.randint(most, (), generator=stream))
