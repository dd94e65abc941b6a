"""One adjoint solve after another along a run: start, preconditioner, stopping rule, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from bilevel import tree
from bilevel.adjoint.starts import DEPTH, Start, begin, with_cached_product
from bilevel.adjoint.stopping import HoldsError
from bilevel.errors import CheckError
from bilevel.linear.cg import PairSelection
from bilevel.linear.guards import solved
from bilevel.preconditioners.recycled import Recycled
from bilevel.types import (
    LearningPreconditioner,
    LinearSolver,
    Matvec,
    Params,
    Point,
    Preconditioner,
    Solve,
    SolverOption,
    Stats,
    System,
    accepted,
)

State = dict[str, Any]
"""{"past": adjoints, "spent": iterations, "preconditioner": its state, "stopping": the rule's}."""

AT_END = 0.1
"""What part of the asked error condition × residual may be where a solve ended by itself: h may be
shorter than (∂²xy G)ᵀ v, and the condition number is seen from below."""


@dataclass(frozen=True)
class AdjointSolver:
    """A linear solver with what makes the next solve of a run cheaper than the last."""

    solver: LinearSolver
    start: Start
    preconditioner: Preconditioner | None = None
    target_error: float | None = None
    """Of h, relative, in the place of the solver's tolerance."""

    @classmethod
    def chosen(
        cls,
        solver: LinearSolver,
        start: Start | None,
        preconditioner: Preconditioner | None,
        target_error: float | None,
    ) -> AdjointSolver:
        """With what brings the fewest products where a target error is asked for and nothing else."""
        if target_error is None:
            return cls(solver, start or "warm", preconditioner)
        return cls(solver, start or "galerkin", preconditioner or Recycled(), target_error)

    def require_accepted(self) -> None:
        """Raise `ValueError` for what it asks of its solver and that does not accept."""
        if missing := self._missing:
            raise ValueError(
                f"target_error and preconditioner need a solver that accepts {', '.join(missing)}, "
                f"and {type(self.solver).__name__} does not; use solver: cg"
            )

    @property
    def _missing(self) -> list[SolverOption]:
        asked: dict[SolverOption, bool] = {
            "stop": self.target_error is not None,
            "precondition": self.preconditioner is not None,
            "observe": self._learns,
        }
        accepts = accepted(self.solver)
        return [option for option, is_asked in asked.items() if is_asked and option not in accepts]

    def init(self, at: Point) -> State:
        kept = self.preconditioner.init(at) if self.preconditioner else {}
        return {"past": [], "spent": None, "preconditioner": kept, "stopping": {}}

    def solve(
        self, system: System, h_of: Callable[[Params], Params], state: State
    ) -> tuple[Params, Solve, State]:
        """(h, v with A v = b, the state for the next solve). The solver may write into b.

        `h_of` is v ↦ ∇x F − (∂²xy G)ᵀ v: 1 cross product. With a target error the statistics have
        the estimate of the error, and `converged` says whether it is reached.
        """
        chosen, kept, inverse = self.preconditioner, state["preconditioner"], None
        if chosen:
            inverse, kept = _prepared(chosen, system, kept)
        rule = HoldsError(self.target_error, h_of, state["stopping"]) if self.target_error else None
        learner = cast("LearningPreconditioner", chosen) if self._learns else None
        pairs = PairSelection(learner.room(system.b)) if learner else None
        solve = self._run(system, state["past"], inverse, rule, pairs)
        if learner and pairs:
            kept = learner.learn(kept, pairs.pairs)
        h = rule.h if rule and rule.h is not None else h_of(solve.solution)
        if rule:
            solve = replace(solve, stats=_judged(solve, rule, self.target_error or 0.0))
            if not _has_positive_curvature(solve, rule):
                return h, solve, state  # what such a solve met helps no other
        depth = DEPTH[self.start]
        return (
            h,
            solve,
            {
                "past": [*state["past"], solve.solution][-depth:] if depth else [],
                "spent": solve.stats.iterations,
                "preconditioner": kept,
                "stopping": rule.memory if rule else {},
            },
        )

    @property
    def _learns(self) -> bool:
        return getattr(self.preconditioner, "learns", False)

    def _run(
        self,
        system: System,
        past: list[Params],
        inverse: Any,
        rule: HoldsError | None,
        pairs: PairSelection | None,
    ) -> Solve:
        accepts = accepted(self.solver)
        start, product = begin(self.start, system.matvec, system.b, past)
        options: dict[str, Any] = {}
        if inverse is not None:
            options["precondition"] = inverse
        if rule:
            options["stop"] = rule
        if pairs:
            options["observe"] = pairs.offer
        if "overwrite" in accepts:
            # b becomes the residual: nobody looks at it again, and it is one vector less
            options["overwrite"] = True
            if any(start is kept for kept in past):
                start = tree.clone(start)
        matvec = system.matvec
        if product is not None:
            matvec = with_cached_product(matvec, start, product)
            del product  # the solver's from now on, which drops it after the first step
        return solved(self.solver, matvec, system.b, start, **options)


def _prepared(
    preconditioner: Preconditioner, system: System, state: Any
) -> tuple[Matvec | None, Any]:
    """M⁻¹ of a preconditioner, which may be somebody's own, or None; and its state.

    Raises `CheckError` where it returns anything else, or M⁻¹ r has another form than r.
    """
    found = preconditioner.prepare(system, state)
    name = f"{type(preconditioner).__name__}.prepare"
    if not isinstance(found, tuple) or len(found) != 2:
        raise CheckError(
            f"{name} must return (r ↦ M⁻¹ r, or None; its state); got a {type(found).__name__}"
        )
    inverse, state = found
    if inverse is None:
        return None, state
    if not callable(inverse):
        raise CheckError(
            f"{name} must return r ↦ M⁻¹ r, or None, and its state; got a {type(inverse).__name__}"
        )

    what = f"what {name} returned must give M⁻¹ r with the form of r,"

    def checked(r: Params) -> Params:
        z = inverse(r)
        tree.require_like(z, r, what)
        return z

    return checked, state


def _judged(solve: Solve, rule: HoldsError, target_error: float) -> Stats:
    """The statistics of a watched solve: whether h is as near as was asked, and why it ended."""
    stats = solve.stats
    # one that ended by itself has the error of v at most, which is condition × residual
    left = (stats.condition or 1.0) * (stats.residual or 0.0)
    reached = rule.reached or left <= AT_END * target_error
    stopped = stats.stopped
    if not _has_positive_curvature(solve, rule):
        reached, stopped = False, "curvature"
    elif not reached and stopped in ("asked", "tolerance"):
        stopped = "rounding"  # it alone exceeds what was asked
    stats = replace(stats, converged=reached, stopped=stopped)
    if stats.residual is None or not math.isfinite(rule.estimate):
        return stats
    source = "Ritz values, y taken as solved"
    return replace(stats, error_bound=rule.estimate, error_bound_from=source)


def _has_positive_curvature(solve: Solve, rule: HoldsError) -> bool:
    """In all that was met, by more than the rounding of its steepest curvature."""
    curvature, b = solve.stats.curvature, solve.solution
    return curvature is None or curvature > tree.eps(b) * rule.steepest
