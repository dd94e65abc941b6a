"""Lower steps along a mixture of ∇y F and ∇y G, differentiated.

BDA: Liu, Mu, Yuan, Zeng and Zhang (2020), arXiv:2006.04045, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.products import gradient_y
from bilevel.components import component
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Estimate, Losses, Moved, Needs, Params, Path, Point, Stats
from bilevel.unrolling.path import along, replay


@component
class Aggregation:
    """d/dx F(x, y_K(x)), y_{k+1} = y_k − α_k · upper_lr · ∇y F − (1 − α_k) · lower_lr · ∇y G.

    α_k = alpha / (k + 1), from y_0 = y, held fixed; y moves to y_K. Where G has many minima in y
    the mixture goes to the one that F likes best, as an optimistic bilevel problem asks for;
    steps along ∇y G alone end wherever they happen to. Exact for the function it differentiates.
    As K grows, y_K(x) tends to that minimum no faster than α_K falls: O(1/K). With one minimum
    plain unrolling is better. Costs K + 1 gradients of F and of G, K HVPs and K cross products of
    each, and the memory of 2K graphs; the last gradient of G is for the log. A problem with `lower_start`
    begins every call there, as published; another one where the last call ended. With
    `project_lower` each step ends in the projection, and is differentiated through it.

    Raises:
        ProblemError: F or G has no second derivative.
        ConvergenceError: F or G became NaN or infinite.
    """

    steps: PositiveInt = 20
    alpha: float = Field(default=0.5, gt=0, le=1)
    upper_lr: PositiveFloat = 0.1
    lower_lr: PositiveFloat = 0.1

    @property
    def needs(self) -> Needs:
        return Needs(moves_lower=True, supports=frozenset({"project_lower"}))

    @property
    def claim(self) -> Literal["path"]:
        return "path"

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        mixed = self._mixed(losses)
        x = tree.leaves(at.x)
        with torch.enable_grad():
            y = replay(self._path(at), mixed.lower, x)
            value = calculus.value(losses.upper, x, y)
        hypergradient = calculus.through(value, x, losses, y)
        counts = losses.counts
        counts.gradients += self.steps + 1  # each step is one of F and one of G
        counts.hvps += 2 * self.steps
        counts.cross_products += 2 * self.steps
        end = tree.detach(y)
        G, g = gradient_y(losses.lower, at.x, end)
        moved = Moved(end, G.item(), tree.norm(g), self.steps)
        return Estimate(hypergradient, value.detach(), state, Stats(iterations=self.steps), moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y_K(x)), the function this estimator claims to differentiate."""
        return along(self._path(at), self._mixed(losses))

    def _mixed(self, losses: Losses) -> Losses:
        """F beside the function whose gradient is the k-th step, α_k being its batch."""

        def function(x: Params, y: Params, alpha: float) -> Tensor:
            F, G = losses.upper(x, y), losses.lower(x, y)
            return alpha * self.upper_lr * F + (1 - alpha) * self.lower_lr * G

        return Losses(losses.upper, replace(losses.lower, function=function))

    def _path(self, at: Point) -> Path:
        weights = tuple(self.alpha / (k + 1) for k in range(self.steps))
        return Path(SGD(lr=1.0), at.y, {}, weights)
