"""Why an estimate is not to be trusted: one table, a line for each kind, read off its evidence.

A run warns in the words of `TABLE` (`bilevel.run.warnings`), `Estimate.reasons` holds them, and
`bilevel.hypergradient` gives them as an `UntrustedWarning`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bilevel import tree
from bilevel.types import Claim, Estimate, Estimator, LowerSolution, Params, Stats

LARGE = 0.1
"""A relative residual above this is warned of, whatever `converged` says."""

CHANGED = 0.05
"""A change of h by a step of y above this is told: the step may end short of the solution."""

SMALL = 1e-3
"""The part of ‖h‖ ‖x‖ up to which an error of F is none, however small F is."""


@dataclass(frozen=True)
class Step:
    """What one estimate left to judge, and the lower solve before it where that is known."""

    estimator: Estimator
    estimate: Estimate
    lower: LowerSolution | None = None
    x: Params | None = None
    lower_batch: Any = None

    @property
    def stats(self) -> Stats:
        return self.estimate.stats

    @cached_property
    def claim(self) -> Claim | None:
        return self.estimator.claim

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing that any rule could hold of, as single-loop methods leave it."""
        stats, lower = self.stats, self.lower
        if not (stats.residual is stats.curvature is stats.degenerate is stats.converged is None):
            return False
        if stats.damping_residual is not None:
            return False
        return lower is None or (lower.stats.converged is None and not lower.stats.infeasible)

    @property
    def has_negative_curvature(self) -> bool:
        """Or none that stands clear of rounding."""
        stats = self.stats
        return stats.curvature is not None and (
            stats.curvature <= 0 or stats.stopped == "curvature"
        )

    @cached_property
    def has_adjoint(self) -> bool:
        """Whether what did not converge is the adjoint system, and not a solve for y."""
        return bool(self.stats.residual) and self.estimator.needs.second_order

    @cached_property
    def has_large_residual(self) -> bool:
        residual = self.stats.residual
        return residual is not None and residual > LARGE and self._matters

    @property
    def has_large_damping(self) -> bool:
        stats = self.stats
        left = stats.damping_residual if stats.damping_error is None else stats.damping_error
        return left is not None and left > LARGE and self._matters

    @property
    def _matters(self) -> bool:
        """Unless the error of h is known to be small, or is as large as the method means it to be."""
        if self.estimate.step is not None:
            return False
        bound = self.stats.error_bound
        return bound is None or bound > LARGE * tree.norm(self.estimate.hypergradient)

    @property
    def is_unmeasured(self) -> bool:
        """Whether dΦ/dx is claimed, or the gradient of no function, and nothing says how far off it is."""
        stats = self.stats
        if self.claim not in ("solution", None):
            return False
        if getattr(self.estimator, "curvature", "hessian") != "hessian":
            return True  # what is known is of another system
        return stats.residual is stats.error_bound is None and not stats.converged

    @cached_property
    def lower_error(self) -> float:
        """How far y is off where its solve met a tolerance, by ‖∇y G‖ / curvature; else 0."""
        return self.lower_distance if self.lower_converged and not self.is_settled else 0.0

    @property
    def is_settled(self) -> bool:
        """Whether what the error of y makes of h was measured, and is little."""
        return self.stats.y_error is not None and self.stats.y_error <= CHANGED

    @cached_property
    def has_value_error(self) -> bool:
        """Whether y is not the lower solution: by what h changes by, measured, or F to first order."""
        stats = self.estimate.stats
        if stats.value_error is None or self.estimate.step is not None:
            return False
        return self.changes_value if stats.y_error is None else stats.y_error > CHANGED

    @property
    def changes_value(self) -> bool:
        """Whether F(x, y*) is, to first order, another than F here."""
        error = abs(self.estimate.stats.value_error or 0.0)
        if error <= LARGE * abs(float(self.estimate.value)):
            return False
        # F may pass through zero, where nothing is small beside it: what it changes by with x is its scale
        scale = tree.norm(self.estimate.hypergradient) * tree.norm(self.x) if self.x else 0.0
        return error > SMALL * scale

    @property
    def unbounded_lower_error(self) -> float:
        """The same where the solve had no tolerance to meet; else 0.

        Where something restricts y, ∇y G need not vanish at y*, and says nothing of the distance.
        """
        if self.lower is None or self.lower_converged is not None or self.is_settled:
            return 0.0
        restricted = self.lower.structure is not None and self.lower.structure.restrictions
        return 0.0 if restricted else self.lower_distance

    @property
    def is_near(self) -> bool:
        """Whether y, short of a tolerance that rounding or a set may not let it meet, is good enough."""
        if self.stats.value_error is None or self.has_value_error or self.lower is None:
            return False
        if self.is_settled:
            return True
        if self.lower.structure is not None and self.lower.structure.restrictions:
            return not self.lower.stats.infeasible  # ∇y G need not vanish there
        return 0 < self.lower_distance <= SMALL * self.lower_size

    @property
    def is_stuck(self) -> bool:
        """Whether the lower solve can go no further, with y far from where ∇y G vanishes."""
        if self.lower is None or self.lower.stats.stopped != "stagnation" or self.is_settled:
            return False
        if self.lower.structure is not None and self.lower.structure.restrictions:
            return False
        return self.claim == "solution" and self.lower_distance > LARGE * self.lower_size

    @property
    def lower_distance(self) -> float:
        """How far y is off, by ‖∇y G‖ / curvature; 0 where no curvature is known."""
        curvature = self.stats.curvature
        return self.lower_norm / curvature if self.lower and curvature and curvature > 0 else 0.0

    @property
    def lower_converged(self) -> bool | None:
        return self.lower.stats.converged if self.lower else None

    @property
    def lower_norm(self) -> float:
        """‖∇y G‖ where the lower solve last looked."""
        return self.lower.stats.gradient_norm if self.lower else 0.0

    @property
    def lower_size(self) -> float:
        return tree.norm(self.lower.y) if self.lower else 0.0

    def has_ended(self, *reasons: str) -> bool:
        """Whether the adjoint solve has not converged, for one of these reasons or, of none, another."""
        unconverged = self.stats.converged is False and self.has_adjoint
        if not unconverged or self.has_large_residual:
            return False
        return self.stats.stopped in reasons if reasons else self.stats.stopped not in EXPLAINED


EXPLAINED = {
    "rounding": (
        "the adjoint solve has come as far as the dtype allows, to a relative residual of {:.2g}, and "
        "that is too far off; set estimator.damping, or use a wider dtype where there is one "
        "(runtime.dtype: float64)"
    ),
    "stagnation": (
        "the adjoint solve gains nothing more at a relative residual of {:.2g}, above its tolerance: "
        "the system is singular to working precision, or restarts forget too much; set "
        "estimator.damping, or raise estimator.solver.restart where there is one"
    ),
    "unverified": (
        "the adjoint solve takes itself to be within its tolerance, and its true relative residual is "
        "{:.2g}: its solver is for symmetric systems, and this is none; use estimator.solver: gmres"
    ),
}
"""Why a solve ended where more iterations do not help, and what does; of the residual."""


@dataclass(frozen=True)
class WarningRule:
    """One kind of warning. It is kept back where a kind of `unless` holds, which explains it."""

    kind: str
    holds: Callable[[Step], bool]
    message: Callable[[Step], str]
    unless: tuple[str, ...] = ()


TABLE = (
    WarningRule(
        "infeasible",
        lambda step: step.lower is not None and step.lower.stats.infeasible,
        lambda step: (
            f"the lower constraints could not be met: y is {_violation(step):.2g} outside them, and no "
            "larger penalty brings it closer. Look whether they can be met at all for this x, or "
            "begin elsewhere"
        ),
    ),
    WarningRule(
        "curvature",
        lambda step: step.has_negative_curvature,
        lambda step: (
            f"the lower Hessian has curvature {step.stats.curvature:.3g} along a search direction: "
            "to working precision it is not positive definite here, so the adjoint is not reliable. "
            "Take more lower steps, or set estimator.damping above its size"
        ),
    ),
    WarningRule(
        "degenerate",
        lambda step: bool(step.stats.degenerate),
        lambda step: (
            f"{step.stats.degenerate} of the lower level's kinks or active constraints are weakly "
            "active or in doubt (strict complementarity fails): the hypergradient is that of one "
            "side. Take more lower steps; if it stays, Φ has no derivative here"
        ),
        unless=("curvature",),
    ),
    WarningRule(
        "inner solve",
        lambda step: step.stats.converged is False and not step.has_adjoint,
        lambda step: (
            "the estimator's inner solve did not reach its tolerance; give estimator.lower more "
            "steps, or raise estimator.strength if the penalised problem has no minimum"
        ),
        unless=("curvature", "degenerate"),
    ),
    WarningRule(
        "adjoint",
        lambda step: step.has_ended(),
        lambda step: (
            f"the adjoint solve ended after {step.stats.iterations} iterations at a relative "
            f"residual of {step.stats.residual:.2g}, above its tolerance; raise "
            "estimator.solver.iterations, or loosen estimator.solver.tolerance"
        ),
        unless=("curvature", "degenerate"),
    ),
    WarningRule(
        "adjoint",
        lambda step: step.has_ended(*EXPLAINED),
        lambda step: EXPLAINED[step.stats.stopped or ""].format(step.stats.residual),
        unless=("curvature", "degenerate"),
    ),
    WarningRule(
        "residual",
        lambda step: step.has_large_residual,
        lambda step: (
            f"the adjoint system is left with a relative residual of {step.stats.residual:.2g}: the "
            "part of the hypergradient that goes through y is off by as much, or by up to the "
            f"condition number times that; {_remedy(step.estimator)}, or look with bilevel check "
            "how far it is off"
        ),
        unless=("curvature",),
    ),
    WarningRule(
        "damping",
        lambda step: step.has_large_damping,
        lambda step: (
            f"{_damped(step.stats)}; set estimator.damping to a smaller value, or look with bilevel "
            "check how far it is off"
        ),
        unless=("curvature", "adjoint", "residual"),
    ),
    WarningRule(
        "lower solve",
        # ‖y‖ last: it is a pass over y, and seldom asked for
        lambda step: step.lower_error > 1e-6 and step.lower_error > LARGE * step.lower_size,
        lambda step: (
            f"the lower solve met its tolerance at ‖∇y G‖ = {step.lower_norm:.1e}, "
            f"but with a curvature of {step.stats.curvature:.1e} that leaves y off by about "
            f"{step.lower_error:.1e}, where its length is {step.lower_size:.1e}: set "
            f"lower.tolerance to {_lower_tolerance(step):.0e}, or lower.relative_tolerance in its place"
        ),
    ),
    WarningRule(
        "lower solve",
        lambda step: (
            step.lower_error > 1e-6 * max(1.0, step.lower_size)
            and step.lower_error <= LARGE * step.lower_size
            and step.has_value_error
        ),
        lambda step: (
            f"the lower solve met its tolerance at ‖∇y G‖ = {step.lower_norm:.1e}, and "
            f"{_value_error(step)}: set lower.tolerance, or lower.relative_tolerance, smaller"
        ),
    ),
    WarningRule(
        "lower solve",
        lambda step: step.is_stuck,
        lambda step: (
            f"the lower solve comes no further than ‖∇y G‖ = {step.lower_norm:.1e}: with a curvature of "
            f"{step.stats.curvature:.1e} that leaves y off by about {step.lower_distance:.1e}, where its "
            f"length is {step.lower_size:.1e}. G may have kinks there (hinge, |·|, ReLU), for which a "
            "hypergradient by second derivatives is wrong: smooth them, or give them as prox_lower or "
            "lower_constraints; else try runtime.dtype: float64"
        ),
    ),
)


LOWER = (
    WarningRule(
        "lower solve",
        lambda step: (
            step.lower_converged is False
            and step.claim == "solution"
            and not step.is_near
            and not step.is_stuck
        ),
        lambda step: (
            f"the lower solve ended at ‖∇y G‖ = {step.lower_norm:.1e}, above its tolerance, and the "
            "hypergradient is that of the lower solution: give the solver more steps, or resume from "
            "its y and state"
        ),
        unless=("infeasible",),
    ),
    WarningRule(
        "lower solve",
        lambda step: (
            step.claim == "solution"
            and step.unbounded_lower_error > 1e-6
            and step.unbounded_lower_error > LARGE * step.lower_size
        ),
        lambda step: (
            f"the lower solve, which has no tolerance, ended at ‖∇y G‖ = {step.lower_norm:.1e}: with "
            f"a curvature of {step.stats.curvature:.1e} that leaves y off by about "
            f"{step.unbounded_lower_error:.1e}, where its length is {step.lower_size:.1e}; take more "
            "steps, or a solver with a tolerance (lower: lbfgs)"
        ),
    ),
    WarningRule(
        "value",
        lambda step: step.lower is not None and step.has_value_error,
        lambda step: _unsolved(step),
        unless=("curvature", "lower solve", "infeasible", "residual"),
    ),
)
"""Beside `TABLE` for one call of `hypergradient`; in a run a lower solve may stop short by design."""

UNMEASURED = (
    "nothing that was computed says how far this is from dΦ/dx: look with bilevel check, or take "
    "estimator: implicit, whose solver cg says when it has converged"
)


def reasons(step: Step) -> tuple[str, ...]:
    """Why not to trust one estimate, in the words that a run would use; empty where nothing is."""
    caution = step.estimator.needs.caution
    said = (message(step) for message in found(step, (*TABLE, *LOWER)).values())
    return (caution(), *said) if caution else tuple(said)


def unwarned(step: Step) -> tuple[str, ...]:
    """Why not to trust an estimate of which nothing else says so, and which is as whoever asked has it.

    Of a y that is given and not solved for here, and of a method that measures nothing of its error.
    """
    if step.has_value_error:
        return (_unsolved(step),)
    return (UNMEASURED,) if step.is_unmeasured else ()


def found(step: Step, table: tuple[WarningRule, ...] = TABLE) -> dict[str, Callable[[Step], str]]:
    """The kinds of warning that hold at a step, in the order of the table, with what gives their messages."""
    if step.is_silent:
        return {}
    holding = [row for row in table if row.holds(step)]
    kinds = {row.kind for row in holding}
    return {row.kind: row.message for row in holding if not kinds.intersection(row.unless)}


def _violation(step: Step) -> float:
    return (step.lower and step.lower.stats.violation) or 0.0


def _damped(stats: Stats) -> str:
    if stats.damping_error is not None:
        return f"with a tenth of the damping the hypergradient is another by {stats.damping_error:.2g} of it"
    return (
        "damping leaves the adjoint system, taken without it, with a relative residual of "
        f"{stats.damping_residual:.2g}: the part of the hypergradient that goes through y is off by as "
        "much, or by up to the condition number times that, except where G is flat in y and in x"
    )


def _unsolved(step: Step) -> str:
    on, further = "", "solve the lower level further"
    if step.lower_batch is not None:
        on, further = " and this lower_batch", f"{further} on this batch"
    return (
        f"y is not the lower solution for this x{on}: {_value_error(step)}; {further}, or pass the y that "
        f"belongs to this x{on}{_of_constraints(step)}"
    )


def _value_error(step: Step) -> str:
    error, value, moved = step.stats.value_error or 0.0, float(step.estimate.value), ""
    if step.stats.y_error is not None:
        moved = f"nearer to that the hypergradient is another by {step.stats.y_error:.2g} of it"
        if not step.changes_value:
            return moved
        moved = f"; {moved}"
    if abs(error) > abs(value):  # what first order says of it is no number to rely on
        return f"F = {value:.3g} here, and is far from that at the lower solution{moved}"
    there = f"{value - error:.3g}"
    return f"F = {value:.3g} here, and at the lower solution, to first order, {there}{moved}"


def _of_constraints(step: Step) -> str:
    if not hasattr(step.estimator, "activity"):
        return ""
    return "; or raise estimator.activity, where an active constraint is taken for inactive"


def _remedy(estimator: Estimator) -> str:
    if hasattr(getattr(estimator, "lower", None), "steps"):
        return "raise estimator.lower.steps"
    solver = getattr(estimator, "solver", None)
    read = [name for name in ("iterations", "rank") if hasattr(solver, name)]
    if not read:
        return "take estimator: implicit, whose solver cg says when it has converged"
    other = "" if type(solver).__name__ == "CG" else ", or take estimator.solver: cg"
    return f"raise estimator.solver.{read[0]}{other}"


def _lower_tolerance(step: Step) -> float:
    """That leaves y off by a thousandth of its length."""
    return 1e-3 * (step.stats.curvature or 0.0) * max(step.lower_size, 1e-3)
