"""Implicit differentiation of the KKT conditions of a constrained lower level.

The derivative of a solution by the implicit function theorem on the active set: Fiacco (1976),
Math. Programming 10; Nocedal and Wright (2006), sec. 12.3 and 16.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.products import Linearization, gradients, linearize
from bilevel.components import Slot, component
from bilevel.errors import ProblemError
from bilevel.linear.guards import flagged, solved
from bilevel.linear.minres import MINRES
from bilevel.scalars.matrices import least_squares
from bilevel.types import (
    Estimate,
    LinearSolver,
    Loss,
    Losses,
    Needs,
    Params,
    Point,
    is_approximate,
    tightened,
)

MULTIPLIER = "multiplier"
"""The name of the multipliers beside those of y; no name of y may be it."""


@component
class KKT:
    """∇x F − (∂²xy L)ᵀ v − (∂x c)ᵀ w with [∂²yy L, Jᵀ; J, 0] (v, w) = (∇y F, 0), L = G + μᵀc.

    c are the equalities of the problem's `lower_constraints` and those inequalities that are
    active at y (c ≥ −activity), J = ∂y c, and the multipliers μ minimise ‖∇y G + Jᵀμ‖. Exact at a
    solution with independent active constraints, multipliers of which none is zero, and positive
    curvature along the constraints; the error is of the order of y's distance from it.

    Costs 3 gradients, the solver's products (HVPs of L) and 1 cross product; one derivative of
    each active constraint, not counted. The system is symmetric and indefinite: `minres` or
    `dense`. `curvature` is that of L along v, which the constraints leave free. Active
    constraints with multipliers of the wrong sign or within `margin` (relative) of zero, and
    dependent ones, are counted in `degenerate` and flagged `converged=False`.

    Raises:
        ProblemError: the problem has no `lower_constraints`, or they are not vectors.
    """

    needs_whole: ClassVar[str] = "a problem with project_lower in place of lower_constraints"
    solver: Annotated[LinearSolver, Slot("linear")] = Field(
        default_factory=lambda: MINRES(iterations=100)
    )
    activity: PositiveFloat = 1e-6
    margin: PositiveFloat = 1e-6

    @property
    def needs(self) -> Needs:
        constraints = frozenset({"lower_constraints"})
        return Needs(requires=constraints, supports=constraints)

    @property
    def claim(self) -> Literal["solution"] | None:
        return None if is_approximate(self.solver) else "solution"

    def tight(self, dim: int) -> KKT:
        """The same method with the solve converged, where its claim can be tested."""
        return replace(self, solver=tightened(self.solver, 2 * dim))

    def init(self, at: Point) -> dict[str, Any]:
        return {}  # the active set changes size, so no adjoint is kept

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower, degenerate = self._system(losses.lower, at)
        b = lower.restrict({**F_y, MULTIPLIER: torch.zeros_like(lower.gradient[MULTIPLIER])})
        solve = solved(self.solver, lower.hvp_yy, b, tree.zeros_like(b))
        v = {name: solve.solution[name] for name in at.y}
        size = tree.dot(v, v)
        stats = replace(
            solve.stats,
            # vᵀ ∂²yy L v = vᵀ(∇y F − Jᵀw) = vᵀ∇y F, since J v = 0
            curvature=tree.dot(v, F_y) / size if size else None,
            degenerate=degenerate,
            value_error=tree.dot(solve.solution, lower.gradient),
        )
        stats = flagged(stats, "degenerate") if degenerate else stats
        return Estimate(tree.sub(F_x, lower.vjp_xy(solve.solution)), value, {}, stats)

    def nearer(self, losses: Losses, at: Point) -> Params | None:
        """y after a step of Newton's method on the KKT conditions, None where their system is not solved.

        2 gradients and the solver's products.
        """
        lower, _ = self._system(losses.lower, at)
        zero = tree.zeros_like(lower.gradient)
        solve = solved(self.solver, lower.hvp_yy, lower.gradient, zero)
        if solve.stats.converged is False:
            return None
        return tree.sub(at.y, {name: solve.solution[name] for name in at.y})

    def _system(self, loss: Loss, at: Point) -> tuple[Linearization, int]:
        """(L with the multipliers beside y, how many constraints are doubtful)."""
        active = _active(loss, at, self.activity)
        _, G_y = calculus.gradient_y(loss, at.x, at.y)
        multiplier, degenerate = _multipliers(active, G_y, self.margin)
        return linearize(_lagrangian(loss, active), _joined(at, multiplier)), degenerate


@dataclass(frozen=True)
class _Active:
    """Which constraints hold with equality at y, and their Jacobian."""

    equal: Tensor
    """Indices into "equality": all of them."""
    bound: Tensor
    """Indices into "inequality"."""
    jacobian: Tensor
    """[active, dim y]."""


def _constraints(loss: Loss, x: Params, y: Params) -> tuple[Tensor, Tensor]:
    """(equalities, inequalities) as vectors; empty where the problem has none of a kind."""
    if loss.structure.constraints is None:
        raise ProblemError(
            "kkt has no constraints to hold: give the problem lower_constraints(x, y, batch), or "
            "use estimator: implicit"
        )
    found = loss.structure.constraints(x, y, loss.batch)
    unknown = set(found) - {"equality", "inequality"}
    if unknown or any(part.dim() != 1 for part in found.values()):
        shapes = {name: tuple(part.shape) for name, part in found.items()}
        raise ProblemError(
            f"lower_constraints returned {shapes}; expected vectors under 'equality' (c = 0) or "
            "'inequality' (c ≤ 0)"
        )
    none = next(iter(y.values())).new_zeros(0)
    return found.get("equality", none), found.get("inequality", none)


def _active(loss: Loss, at: Point, activity: float) -> _Active:
    y = tree.leaves(at.y)
    with torch.enable_grad():
        equal, bound = _constraints(loss, at.x, y)
        chosen = (bound.detach() >= -activity).nonzero()[:, 0]
        active = torch.cat([equal, bound[chosen]])
        rows = [
            tree.flatten(calculus.vjp({"c": c}, y, {"c": torch.ones_like(c)}, loss)) for c in active
        ]
    like = tree.flatten(at.y)
    jacobian = torch.stack(rows) if rows else like.new_zeros(0, len(like))
    return _Active(torch.arange(len(equal), device=like.device), chosen, jacobian)


def _multipliers(active: _Active, G_y: Params, margin: float) -> tuple[Tensor, int]:
    """(argmin over μ of ‖∇y G + Jᵀμ‖, how many are doubtful)."""
    J, g = tree.wide(active.jacobian), tree.wide(tree.flatten(G_y))
    if not len(J):
        return g.new_zeros(0), 0
    mu = least_squares(J.T, -g)
    dependent = len(J) - int(torch.linalg.matrix_rank(J))
    bounds = mu[len(active.equal) :]
    weak = int((bounds <= margin * (1 + float(g.norm()))).sum())
    return mu.to(tree.flatten(G_y).dtype), weak + dependent


def _joined(at: Point, multiplier: Tensor) -> Point:
    if MULTIPLIER in at.y:
        raise ProblemError(
            f"kkt keeps its multipliers under {MULTIPLIER!r}; rename that entry of y"
        )
    return replace(at, y={**at.y, MULTIPLIER: multiplier})


def _lagrangian(loss: Loss, active: _Active) -> Loss:
    """L(x, (y, μ)) = G + μᵀc, whose second derivatives are the whole KKT system."""

    def lagrangian(x: Params, joined: Params, batch: Any) -> Tensor:
        y = {name: part for name, part in joined.items() if name != MULTIPLIER}
        equal, bound = _constraints(loss, x, y)
        c = torch.cat([equal, bound[active.bound]])
        return loss.function(x, y, batch) + joined[MULTIPLIER] @ c

    return replace(loss, function=lagrangian)
