"""Minimisation under smooth constraints by the augmented Lagrangian.

Nocedal and Wright (2006), algorithm 17.4 with inequalities as in (17.65), where they have slacks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.products import first_not_finite
from bilevel.components import Slot, component
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.lower.newton import Newton
from bilevel.lower.solved import solved
from bilevel.lower.start import at_start
from bilevel.lower.tolerance import curvature_along
from bilevel.types import (
    Loss,
    LowerSolution,
    LowerSolver,
    LowerStats,
    Offers,
    Params,
    Stopped,
    Structure,
)

GROWTH = 10.0
"""By how much the penalty grows; 100 in the book, which a solver of first order has to pay for."""
STALLED = 5
"""Times in a row that a larger penalty may gain less than a tenth of the violation."""


@component
class AugmentedLagrangian:
    """min over y of G under the problem's `lower_constraints`, c = 0 and d ≤ 0, multipliers kept.

    L = G + λᵀc + ρ/2 ‖c‖² + Σ (max(μ + ρ d, 0)² − μ²) / 2ρ is minimised in y by `solver`, as far
    as the constraints are met by then; λ ← λ + ρ c and μ ← max(μ + ρ d, 0) where they are met as
    well as asked for, else ρ grows tenfold. Stops where the violation, ‖c‖ and ‖max(d, −μ / ρ)‖
    together, is at most `tolerance`, and ‖∇y L‖ that times the curvature of G along its gradient at
    the first start (2 gradients), or after `rounds` minimisations.

    Converges linearly for fixed ρ, at a rate of O(1/ρ), where the active constraints are
    independent, their multipliers not zero and L curves up along them; each round costs `solver`'s
    gradients and HVPs, its `tolerance` being set to what the round asks for. For large y take
    lbfgs, which compares values of L and so comes no nearer than √eps of their size: tolerance 1e-5.
    ρ is `penalty` at first, by default 10 times that curvature; it, λ and μ go on from call to call. y is outside the constraints by up
    to `tolerance`; kkt's `activity` had better be larger. A `project_lower` beside the constraints
    says the same and is not used. Draws one batch a solve. No path.

    Where five tenfold penalties in a row gain less than a tenth of the violation, it ends with
    `LowerStats.infeasible`, and the next call begins with the ρ, λ and μ of this one's beginning.

    Raises:
        ProblemError: the problem has no `lower_constraints`.
    """

    needs_whole: ClassVar[str] = "a problem with project_lower in place of lower_constraints"
    rounds: PositiveInt = 50
    penalty: PositiveFloat | None = None
    tolerance: PositiveFloat = 1e-8
    solver: Annotated[LowerSolver, Slot("lower")] = Field(default_factory=Newton)

    @property
    def offers(self) -> Offers:
        inner = self.solver.offers.learned
        return Offers(learned=inner, supports=frozenset({"lower_constraints"}))

    def init(self, y: Params) -> dict[str, Any]:
        inner = self.solver.init(y)
        return {"penalty": self.penalty, "multipliers": {}, "solver": inner, "curvature": 0.0}

    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
    ) -> LowerSolution:
        batch = next(batches)
        loss, inner = loss.on(batch), state["solver"]
        curvature, spent = state["curvature"], 0
        if not curvature:
            with at_start(0):
                _, g = calculus.gradient_y(loss, x, y)
            curvature, spent = curvature_along(loss, x, y, g) or 1.0, 2
        rho = state["penalty"] or 10 * curvature
        multipliers = state["multipliers"] or tree.zeros_like(_constraints(loss, x, y))
        # in the book G has curvature 1: what is asked of ∇y L is in its units here
        asked, close = (rho / curvature) ** -0.1, curvature / rho
        steps, gradients, hvps = 0, spent, 0
        norm, converged = float("nan"), False
        violation, least, stalled = float("nan"), float("inf"), 0
        for _ in range(self.rounds):
            solver = _to(self.solver, max(close, self.tolerance) * curvature)
            augmented = _augmented(loss, multipliers, rho)
            end = solved(solver, augmented, x, y, batches=itertools.repeat(batch), state=inner)
            y, inner, norm = end.y, end.state, end.stats.gradient_norm
            steps, gradients = steps + end.stats.steps, gradients + end.stats.gradients
            hvps += end.stats.hvps
            moved = _moved(multipliers, _constraints(loss, x, y), rho)
            violation = tree.norm(tree.sub(moved, multipliers)) / rho
            if violation <= max(asked, self.tolerance):
                multipliers = moved
                stalled = 0
                converged = max(violation, norm / curvature) <= self.tolerance
                if converged:
                    break
                asked, close = asked * (curvature / rho) ** 0.9, close * curvature / rho
            else:
                stalled = 0 if violation < 0.9 * least else stalled + 1
                least = min(least, violation)
                if stalled == STALLED:
                    break
                rho = GROWTH * rho
                asked, close = (rho / curvature) ** -0.1, curvature / rho
        with torch.no_grad():
            value = loss(x, y).item()
        stopped: Stopped = "tolerance" if converged else "iterations"
        if stalled == STALLED:
            stopped = "infeasible"
        stats = LowerStats(steps, gradients, value, norm, converged, hvps, violation, stopped)
        kept = {"penalty": rho, "multipliers": multipliers, "solver": inner, "curvature": curvature}
        if (
            stats.infeasible
        ):  # a penalty without bound would follow the run to where they can be met
            kept = state
        return LowerSolution(tree.clone(y), kept, stats, batch)


def _to(solver: LowerSolver, tolerance: float) -> LowerSolver:
    """The solver stopping at a gradient of that size, where it has a tolerance at all."""
    chosen: Any = solver
    if not hasattr(solver, "tolerance"):
        return solver
    return replace(chosen, tolerance=tolerance)


def _constraints(loss: Loss, x: Params, y: Params) -> Params:
    """The lower constraints at a point, with no graph."""
    if loss.structure.constraints is None:
        raise ProblemError(
            "lower: augmented_lagrangian is for problems with lower_constraints, and there are "
            "none; add them, or use lower: lbfgs"
        )
    with torch.no_grad():
        at = loss.structure.constraints(x, y, loss.one_batch)
    blamed = first_not_finite({"x": x, "y": y, "lower_constraints": at})
    if blamed:
        raise ConvergenceError(
            f"augmented_lagrangian: {blamed[0]}[{blamed[1]!r}] has {blamed[2]}; begin where the "
            "constraints are defined (solve_lower's y, the problem's init or lower_start)"
        )
    return at


def _moved(multipliers: Params, at: Params, rho: float) -> Params:
    """λ + ρ c and max(μ + ρ d, 0); from the old ones by ρ times the violation."""
    return {
        name: part.clamp(min=0) if name == "inequality" else part
        for name, part in tree.axpy(rho, at, multipliers).items()
    }


def _augmented(loss: Loss, multipliers: Params, rho: float) -> Loss:
    """(x, y) ↦ L, whose gradient is that of the Lagrangian at the moved multipliers."""

    def function(x: Params, y: Params, batch: Any) -> Tensor:
        assert loss.structure.constraints is not None
        total = loss.function(x, y, batch)
        for name, part in loss.structure.constraints(x, y, batch).items():
            moved = multipliers[name] + rho * part
            moved = moved.clamp(min=0) if name == "inequality" else moved
            total = total + (moved.square() - multipliers[name].square()).sum() / (2 * rho)
        return total

    # the constraints are in the function; a projection beside them says the same
    return replace(loss, function=function, structure=Structure())
