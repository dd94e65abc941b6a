"""One differentiated step of whatever optimizer the lower level has, by first derivatives alone.

SAMA: Choe et al. (2023), "Making Scalable Meta Learning Practical", arXiv:2310.05674.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from bilevel import tree
from bilevel.calculus.finite_differences import cross_difference
from bilevel.calculus.products import gradient_y, gradients
from bilevel.components import component
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats
from bilevel.unrolling.path import advance, recorded


@component
class Sama:
    """∇x F − (∇x G(x, y + εv) − ∇x G(x, y − εv)) / 2ε with v = (∂u/∂g)ᵀ ∇y F, ε = epsilon / ‖v‖.

    u = y_{K−1} − y_K is what the lower optimizer took off in its last recorded step and g the
    gradient it was given: ∂u/∂g is lr · I for SGD and diagonal for Adam and RMSprop. It is taken
    by differentiating the optimizer, not the loss, so no second derivative of G is needed. The
    difference is off (∂²xy G)ᵀ v by O(ε²); what then remains is implicit differentiation with I
    in the place of ∂u/∂y, so a biased estimate of dΦ/dx whose length depends on lr. A projection
    after the step is not seen. Costs 4 gradients, and those of the recorded steps before the last.

    Raises:
        ProblemError: no lower step was recorded; y is of a dtype too coarse for `epsilon`.
    """

    epsilon: PositiveFloat = 1e-2

    @property
    def needs(self) -> Needs:
        return Needs(second_order=False, path=1)

    @property
    def claim(self) -> Literal["step"]:
        return "step"

    def tight(self, dim: int) -> Sama:
        """The same with a difference so small that its truncation error cannot be seen."""
        return replace(self, epsilon=min(self.epsilon, 1e-4))

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        v = _adapted(losses, at, F_y)
        cross = cross_difference("sama", losses.lower, at, v, self.epsilon)
        return Estimate(tree.sub(F_x, cross), value, state, Stats(iterations=1))

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y) − ⟨v, ∇y G(x, y)⟩ at fixed y and v: F after the step, to first order."""
        _, _, F_y = gradients(losses.upper, at)
        v = _adapted(losses, at, F_y)

        def expanded(x: Params) -> Tensor:
            _, G_y = gradient_y(losses.lower, x, at.y)
            return losses.upper(x, at.y) - torch.as_tensor(tree.dot(v, G_y), dtype=torch.float64)

        return expanded


def _adapted(losses: Losses, at: Point, vector: Params) -> Params:
    """(∂u/∂g)ᵀ · vector for the last recorded step. 1 gradient if no more were recorded."""
    path = recorded(at, "sama")
    if not path.batches:  # the solve met its tolerance where it began: y was not moved
        return tree.zeros_like(vector)
    last = advance(path, losses.lower, at.x, len(path.batches) - 1)
    _, g = gradient_y(losses.lower.on(last.batches[0]), at.x, last.start)
    g = tree.leaves(g)
    with torch.enable_grad():
        y, _ = last.optimizer.step(last.start, g, last.state)
    found = torch.autograd.grad(
        list(y.values()), list(g.values()), [-vector[name] for name in y], allow_unused=True
    )
    return {
        name: torch.zeros_like(entry) if part is None else part
        for (name, entry), part in zip(g.items(), found, strict=True)
    }
