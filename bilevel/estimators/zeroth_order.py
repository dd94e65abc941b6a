"""Hypergradients from values: Gaussian smoothing, evolution strategies, and PZOBO.

Nesterov and Spokoiny (2017), Found. Comput. Math. 17; partial (PZOBO): Sow, Ji and Liang (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.calculus.products import gradients
from bilevel.components import component
from bilevel.scalars.functions import call
from bilevel.scalars.matrices import tensor_of
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats
from bilevel.unrolling.path import advance, along, recorded


@component
class ZerothOrder:
    """Mean over normal d of (P(x + μ d) − P(x − μ d)) / 2μ · d, with P(x) = F(x, y_K(x)).

    Unbiased for the gradient of the smoothed P_μ(x) = E P(x + μ d), which is off dP/dx by O(μ²);
    variance O(dim x / samples). Costs 2K gradients and 2 values of F a sample, and K gradients and
    1 value for the path itself; no gradient of F but 1 if `partial`. With `partial` only the response of y_K is differenced,
    ∇x F + (y_K(x + μ d) − y_K(x − μ d))ᵀ ∇y F / 2μ · d: the same bias, far less variance where
    ∇x F is large.

    Raises:
        ProblemError: no lower step was recorded.
    """

    samples: PositiveInt = 10
    smoothing: PositiveFloat = 1e-3
    partial: bool = False
    seed: int = 0

    @property
    def needs(self) -> Needs:
        # the values at both ends, and the steps that lead there, are rounded: about three times
        # what one gradient is, by measurement
        rounding_amplification = 3 / self.smoothing
        rounding_remedy = "a larger smoothing"
        return Needs(
            second_order=False,
            path=float("inf"),
            learned=True,
            rounding_amplification=rounding_amplification,
            rounding_remedy=rounding_remedy,
        )

    @property
    def claim(self) -> Literal["path"] | None:
        return None

    def init(self, at: Point) -> dict[str, int]:
        return {"calls": 0}

    def estimate(self, losses: Losses, at: Point, state: dict[str, int]) -> Estimate:
        path = recorded(at, "zeroth_order")
        end = advance(path, losses.lower, at.x, len(path.batches)).start
        probe: Callable[[Params], Tensor]
        if self.partial:
            value, h, F_y = gradients(losses.upper, Point(at.x, end))

            def response(x: Params) -> Tensor:
                y = advance(path, losses.lower, x, len(path.batches)).start
                return tensor_of(tree.dot(y, F_y))

            probe = response
        else:
            with torch.no_grad():
                value, h = losses.upper(at.x, end), tree.zeros_like(at.x)
            # x is in use as far as values can tell: a difference has no graph to look into
            losses.counts.reached.update(at.x)
            probe = along(path, losses)
        for sample in range(self.samples):
            d = call(_direction, self.seed, state["calls"], sample, at.x)
            above, below = (probe(tree.axpy(s * self.smoothing, d, at.x)) for s in (1, -1))
            slope = (above - below).item() / (2 * self.smoothing)
            tree.axpy_(h, slope / self.samples, d)
        stats = Stats(iterations=self.samples)
        return Estimate(h, value, {"calls": state["calls"] + 1}, stats)


def _direction(seed: int, calls: int, sample: int, like: Params) -> Params:
    stream = rng.stream(seed, f"zeroth.{calls}.{sample}")
    return tree.drawn(lambda p: torch.randn(p.shape, generator=stream).to(p), like)
