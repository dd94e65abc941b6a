"""Adaptive accuracy with a line search on x: the method of adaptive inexact descent, MAID.

Salehi, Mukherjee, Roberts and Ehrhardt (2023), arXiv:2308.10098. The paper's constants are known
beforehand; here those that are not given are estimated as it goes, and what is then certified is
an estimate too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import tree
from bilevel.calculus.products import gradient_y, gradients, linearize
from bilevel.components import Slot, component
from bilevel.errors import ConvergenceError, ProblemError
from bilevel.linear.cg import CG
from bilevel.lower.proximal import Proximal
from bilevel.lower.solved import solved
from bilevel.types import (
    KNOWN_CONSTANTS,
    Estimate,
    LinearSolver,
    Losses,
    LowerSolver,
    Moved,
    Needs,
    Params,
    Point,
    Stats,
)


@component
class MAID:
    """Implicit differentiation at an accuracy that is as coarse as a descent step of x allows.

    y is solved to ‖∇y G‖ ≤ ε and the adjoint to a relative residual ε, until the error bound

        ω = ‖B‖ ‖r‖ / μ + L ‖∇y G‖ / μ ≤ (1 − descent) ‖h‖,    B = ∂²xy G, r the adjoint's residual

    so that −h is a descent direction. x then moves by `step` along −h, halved until Φ has fallen
    by descent · step · ‖h‖² whatever the errors of both values may be, ‖∇y F‖ e + S e² / 2 with
    e = ‖∇y G‖ / μ; a step at which a loss overflows is halved as well. If no step is certified ε
    is multiplied by `tighten`; after one, ε by `accuracy_growth` and the step by `step_growth`.
    Below `min_accuracy` nothing is certified any more and x stays.

    With a lower bound μ of the eigenvalues of ∂²yy G (`strong_convexity`), an upper bound of
    ‖∂²xy G‖ (`cross_norm`), a Lipschitz constant in y of ∇x F − Bᵀ(∂²yy G)⁻¹ ∇y F (`sensitivity`)
    and one of ∇y F (`upper_smoothness`, S), ω bounds ‖h − dΦ/dx‖ (Ghadimi and Wang 2018, arXiv:1802.02246, lemma
    2.2), and each step lowers Φ by what is said, in exact arithmetic. Else nothing of this is
    guaranteed: μ is the smallest curvature that the adjoint solves have met, which is too large
    until they meet the smallest; ‖B‖ is ‖Bᵀ v‖ / ‖v‖, which is too small in general; L is the
    largest slope of h seen while ε was tightened, at least `sensitivity`; S is 2 unless given. Each errs
    towards certifying too much. `error_bound_from` says which it is, `sensitivity` counting as known
    where both others are given.

    h is exact in the limit ε → 0. Losses have to be deterministic. Moves y and x: the
    run's lower solver and upper optimizer are not used. A trial step costs what `lower` takes
    and 3 gradients; an attempt at h what `lower` takes, 3 gradients, the adjoint's HVPs and 1
    cross product.

    Raises:
        ConvergenceError: the lower Hessian is not positive definite.
        ProblemError: a solver has no `tolerance`.
    """

    accuracy: PositiveFloat = 0.1
    step: PositiveFloat = 1.0
    descent: float = Field(default=0.1, gt=0, lt=1)
    tighten: float = Field(default=0.25, gt=0, lt=1)
    accuracy_growth: float = Field(default=1.5, ge=1)
    step_growth: float = Field(default=1.5, ge=1)
    sensitivity: NonNegativeFloat = 0.1
    strong_convexity: PositiveFloat | None = None
    cross_norm: PositiveFloat | None = None
    upper_smoothness: PositiveFloat = 2.0
    min_accuracy: PositiveFloat = 1e-10
    backtracks: PositiveInt = 8
    lower: Annotated[LowerSolver, Slot("lower")] = Field(
        default_factory=lambda: Proximal(steps=5000, lr=1.0)
    )
    adjoint: Annotated[LinearSolver, Slot("linear")] = Field(
        default_factory=lambda: CG(iterations=200)
    )

    @property
    def needs(self) -> Needs:
        return Needs(moves_lower=True, moves_upper=True)

    @property
    def claim(self) -> Literal["solution"]:
        return "solution"

    def tight(self, dim: int) -> MAID:
        """The same method as fine as it goes from the start."""
        return replace(self, accuracy=self.min_accuracy, adjoint=CG().tight(dim))

    def init(self, at: Point) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "step": self.step,
            "adjoint": tree.zeros_like(at.y),
            "curvature": self.strong_convexity or math.inf,
            "sensitivity": self.sensitivity,
            "lower": self.lower.init(at.y),
        }

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        state, y, before = dict(state), at.y, None
        while True:
            found = self._attempt(losses, at.x, y, state)
            state |= {"adjoint": found.adjoint, "curvature": found.curvature}
            state["sensitivity"] = max(state["sensitivity"], _sensitivity(before, found))
            bound = found.bound(state["sensitivity"])
            taken = (
                self._search(losses, at.x, found, state) if self._descends(found, bound) else None
            )
            if taken:
                break
            if state["accuracy"] <= self.min_accuracy:
                taken = _Trial(found.y, 0.0, found.lower, found.norm)
                break
            tighter = max(self.tighten * state["accuracy"], self.min_accuracy)
            state, y, before = state | {"accuracy": tighter}, found.y, found
        step = taken.step or state["step"] / self.step_growth
        after = state | {
            "accuracy": min(self.accuracy_growth * state["accuracy"], self.accuracy),
            "step": self.step_growth * step,
        }
        moved = Moved(taken.y, taken.lower, taken.norm)
        known = self.strong_convexity is not None and self.cross_norm is not None
        source = KNOWN_CONSTANTS if known else "estimated"
        stats = replace(found.stats, error_bound=bound, error_bound_from=source)
        return Estimate(found.h, found.value, after, stats, moved, taken.step)

    def _descends(self, found: _Found, bound: float) -> bool:
        return bound <= (1 - self.descent) * tree.norm(found.h)

    def _solve(self, losses: Losses, x: Params, y: Params, state: dict[str, Any]) -> Params:
        """y with ‖∇y G‖ ≤ ε, as far as `lower` gets; itself where it is so already."""
        _, g = gradient_y(losses.lower, x, y)
        if tree.norm(g) <= state["accuracy"]:
            return y
        solver, batch = _to(self.lower, state["accuracy"]), losses.lower.batch
        end = solved(
            solver,
            losses.lower,
            x,
            y,
            batches=itertools.repeat(batch),
            state=state["lower"],
        )
        state["lower"] = end.state
        return end.y

    def _attempt(self, losses: Losses, x: Params, y: Params, state: dict[str, Any]) -> _Found:
        """The hypergradient at accuracy ε."""
        y = self._solve(losses, x, y, state)
        at = Point(x, y)
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        b = lower.restrict(F_y)
        solve = _to(self.adjoint, min(state["accuracy"], 0.5)).solve(
            lower.hvp_yy, b, state["adjoint"]
        )
        v, stats = solve.solution, solve.stats
        met = stats.curvature if stats.curvature is not None else math.inf
        if met <= 0:
            raise ConvergenceError(
                f"the lower Hessian has curvature {met:.3g}: maid certifies its steps by strong "
                "convexity; use estimator: implicit with damping, or unroll"
            )
        cross = lower.vjp_xy(v)
        curvature = min(met, state["curvature"])
        left = (stats.residual or 0.0) * tree.norm(b)
        size = tree.norm(v)
        coupling = self.cross_norm or (tree.norm(cross) / size if size else 0.0)
        return _Found(
            h=tree.sub(F_x, cross),
            value=value,
            y=y,
            lower=float(lower.value),
            norm=tree.norm(lower.gradient),
            slope_F=tree.norm(F_y),
            adjoint=v,
            curvature=curvature,
            coupled=coupling * left,
            smoothness=self.upper_smoothness,
            stats=stats,
        )

    def _search(
        self, losses: Losses, x: Params, found: _Found, state: dict[str, Any]
    ) -> _Trial | None:
        """The longest step of the sequence whose descent is certain; None if there is none."""
        step, size = state["step"], tree.norm(found.h)
        here = float(found.value) - found.doubt(found.norm, found.slope_F)
        for _ in range(self.backtracks):
            tried = self._try(losses, tree.axpy(-step, found.h, x), found, state)
            if tried and tried[0] - here <= -self.descent * step * size**2:
                return replace(tried[1], step=step)
            step /= 2
        return None

    def _try(
        self, losses: Losses, x: Params, found: _Found, state: dict[str, Any]
    ) -> tuple[float, _Trial] | None:
        """The most that Φ may be at x, and where y is there; None where a loss overflows."""
        kept = dict(state)
        try:
            y = self._solve(losses, x, found.y, state)
            lower, g = gradient_y(losses.lower, x, y)
            value, F_y = gradient_y(losses.upper, x, y)
        except ConvergenceError:  # too long a step is a reason to halve it
            state |= kept
            return None
        norm = tree.norm(g)
        worst = float(value) + found.doubt(norm, tree.norm(F_y))
        return worst, _Trial(y, 0.0, float(lower), norm)


@dataclass(frozen=True)
class _Found:
    """A hypergradient at some accuracy, with what bounds its error."""

    h: Params
    value: Any
    y: Params
    lower: float
    norm: float
    """‖∇y G‖."""
    slope_F: float
    """‖∇y F‖."""
    adjoint: Params
    curvature: float
    coupled: float
    """‖B‖ ‖r‖."""
    smoothness: float
    """S."""
    stats: Stats

    def bound(self, slope: float) -> float:
        """ω: how far h may be from dΦ/dx."""
        if math.isinf(self.curvature):  # ∇y F = 0: there was nothing to solve
            return slope * self.norm
        return (self.coupled + slope * self.norm) / self.curvature

    def doubt(self, norm: float, slope_F: float) -> float:
        """How far F may be from Φ at a y of this ‖∇y G‖."""
        off = 0.0 if math.isinf(self.curvature) else norm / self.curvature
        return slope_F * off + self.smoothness / 2 * off * off


@dataclass(frozen=True)
class _Trial:
    """Where a step led."""

    y: Params
    step: float
    lower: float
    norm: float


def _sensitivity(before: _Found | None, after: _Found) -> float:
    """‖h − h'‖ / ‖y − y'‖ between two accuracies at one x."""
    if before is None:
        return 0.0
    moved = tree.norm(tree.sub(after.y, before.y))
    return tree.norm(tree.sub(after.h, before.h)) / moved if moved else 0.0


def _to(solver: Any, tolerance: float) -> Any:
    """The solver, stopping at a tolerance."""
    if "tolerance" not in {field.name for field in fields(solver)}:
        raise ProblemError(
            f"maid sets the tolerance of its solvers, and {solver!r} has none; use gradient, "
            "proximal, lbfgs or newton below, and cg or minres for the adjoint"
        )
    return replace(solver, tolerance=tolerance)
