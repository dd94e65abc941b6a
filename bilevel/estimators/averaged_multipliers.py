"""One step each of y, of the multiplier of ∇y (μF + (1 − μ)G) = 0, and of x.

sl-BAMM: Liu, Liu, Yao, Zeng and Zhang (2023), arXiv:2302.03407, the single-loop method; elsewhere
called dual multiplier. All three directions are taken at one point, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import Linearization, gradients, linearize
from bilevel.components import component
from bilevel.errors import ProblemError
from bilevel.lower.auxiliary import batches_of, begin, exact, minimise
from bilevel.types import Estimate, Loss, Losses, Moved, Needs, Params, Point, Stats

TIGHT = 5000
"""Steps of `tight`, enough at a step size of 1 / L for a condition number of some hundreds."""


@component
class AveragedMultipliers:
    """∇x F − (∂²xy φ)ᵀ v, while y moves along ∇y φ and v along (∂²yy φ) v − ∇y F; φ = μF + (1 − μ)G.

    μ = mu · (call + 1)^(−mu_decay), and the step of v is multiplier_lr ·
    (call + 1)^(−multiplier_decay); that of y is `lower_lr`, that of x the upper optimizer's (`sgd`;
    the paper lets it fall with μ³). v is the multiplier of ∇y φ = 0, the adjoint where it has
    settled. φ is strongly convex in y where F is, however many minima G has: y goes to the one
    that F likes best, as an optimistic bilevel problem asks for. With y and v settled it is the
    exact gradient of x ↦ F(x, argmin over y of φ), off dΦ/dx by O(μ) where G is strongly convex;
    before that it is of nothing. The system of v is as ill-conditioned as φ, where G is flat by
    O(1/μ), so μ had better not fall fast.

    `steps` of y and v are taken with x held, one as published; the hypergradient is that before
    the last. With a `tolerance` they end once ‖∇y φ‖ and ‖(∂²yy φ) v − ∇y F‖ / ‖∇y F‖ are at most
    that, and the stats say whether they are. No path and no solve. Costs 3 gradients and 2 HVPs a
    step, one of F and one of G, and 2 cross products; 1 HVP and 1 cross product with mu = 0.

    Raises:
        ProblemError: y is restricted to a set.
    """

    mu: float = Field(default=0.9, ge=0, lt=1)
    mu_decay: NonNegativeFloat = 0.1
    lower_lr: PositiveFloat = 0.1
    multiplier_lr: PositiveFloat = 0.1
    multiplier_decay: NonNegativeFloat = 0.0
    steps: PositiveInt = 1
    tolerance: NonNegativeFloat = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(moves_lower=True)

    @property
    def claim(self) -> Literal["penalty"]:
        return "penalty"

    def tight(self, dim: int) -> AveragedMultipliers:
        """The same with y and v settled at x."""
        return replace(self, steps=TIGHT, tolerance=1e-9)

    def init(self, at: Point) -> dict[str, Any]:
        return {"calls": 0, "v": tree.zeros_like(at.y)}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        if losses.lower.structure.project is not None:
            raise ProblemError(
                "averaged_multipliers has a multiplier for ∇y φ = 0 and none for a set that "
                "restricts y; use estimator: unroll, which projects after each step"
            )
        calls = state["calls"]
        mu = self.mu * (calls + 1) ** -self.mu_decay
        rate = self.multiplier_lr * (calls + 1) ** -self.multiplier_decay
        here, y, v, taken = None, at.y, state["v"], 0
        while taken < self.steps and not (here and here.rests(self.tolerance)):
            here = _look(losses, mu, Point(at.x, y), v)
            y = tree.axpy(-self.lower_lr, here.mixed.gradient, y)
            v, taken = tree.axpy(-rate, here.left, v), taken + 1
        assert here is not None
        h = tree.sub(here.F_x, here.mixed.vjp_xy(here.v))
        losses.counts.cross_products += mu > 0
        settled = here.rests(self.tolerance) if self.tolerance else None
        stopped = "tolerance" if settled else "iterations"
        stats = Stats(iterations=taken, residual=here.residual, converged=settled, stopped=stopped)
        moved = Moved(y, here.mixed.value.item(), tree.norm(here.mixed.gradient), taken)
        return Estimate(h, here.F, {"calls": calls + 1, "v": v}, stats, moved)

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, argmin over y of φ) at the first call's μ."""
        mixed, solver = _mixed(losses, self.mu), exact(tree.size(at.y))

        def value(x: Params) -> Tensor:
            batches = batches_of(replace(losses.lower, draws=None))
            end = minimise(solver, mixed.function, losses, x, begin(solver, at.y), batches, parts=2)
            return losses.upper(x, end["y"])

        return value


@dataclass(frozen=True)
class _Look:
    """Everything the three directions are made of, at one (x, y, v)."""

    F: Tensor
    F_x: Params
    mixed: Linearization
    """∇y φ and its derivatives."""
    v: Params
    left: Params
    """(∂²yy φ) v − ∇y F."""
    residual: float

    def rests(self, tolerance: float) -> bool:
        if not tolerance:
            return False
        return max(tree.norm(self.mixed.gradient), self.residual) <= tolerance


def _look(losses: Losses, mu: float, at: Point, v: Params) -> _Look:
    F, F_x, F_y = gradients(losses.upper, at)
    mixed = linearize(_mixed(losses, mu), at)
    F_y = mixed.restrict(F_y)
    left = tree.sub(mixed.hvp_yy(v), F_y)
    losses.counts.gradients += mu > 0  # φ is one F and one G
    losses.counts.hvps += mu > 0
    residual = tree.norm(left) / (tree.norm(F_y) or 1.0)
    return _Look(F, F_x, mixed, v, left, residual)


def _mixed(losses: Losses, mu: float) -> Loss:
    """φ = μF + (1 − μ)G, F on its own batch."""
    if mu == 0:
        return losses.lower

    def function(x: Params, y: Params, batch: Any) -> Tensor:
        return mu * losses.upper(x, y) + (1 - mu) * losses.lower.on(batch)(x, y)

    return replace(losses.lower, function=function)
