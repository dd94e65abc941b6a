"""What a run warns of: one table, a line for each kind, read off the statistics of a step.

`TABLE` is all that there is. A kind is said the first time that it holds and counted every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bilevel import tree
from bilevel.events import Warned
from bilevel.run.refusals import called
from bilevel.run.setup import Setup, State
from bilevel.types import Estimate, Estimator, LowerSolution, Stats

LARGE = 0.1
"""A relative residual above this is warned of, whatever `converged` says."""


@dataclass(frozen=True)
class Step:
    """What one upper step left to judge."""

    estimator: Estimator
    estimate: Estimate
    lower: LowerSolution

    @property
    def stats(self) -> Stats:
        return self.estimate.stats

    @property
    def has_negative_curvature(self) -> bool:
        """Or none that stands clear of rounding."""
        stats = self.stats
        return stats.curvature is not None and (
            stats.curvature <= 0 or stats.stopped == "curvature"
        )

    @property
    def has_adjoint(self) -> bool:
        """Whether what did not converge is the adjoint system, and not a solve for y."""
        return bool(self.stats.residual) and self.estimator.needs.second_order

    @property
    def has_large_residual(self) -> bool:
        """Unless the error of h is known to be small, or is as large as the method means it to be."""
        stats = self.stats
        if stats.residual is None or stats.residual <= LARGE or self.estimate.step is not None:
            return False
        bound = stats.error_bound
        return bound is None or bound > LARGE * tree.norm(self.estimate.hypergradient)

    @property
    def lower_error(self) -> float:
        """How far y is off where its solve met a tolerance, by ‖∇y G‖ / curvature; else 0."""
        curvature = self.stats.curvature
        if not self.lower.stats.converged or not curvature or curvature < 0:
            return 0.0
        return self.lower.stats.gradient_norm / curvature

    @property
    def lower_size(self) -> float:
        return tree.norm(self.lower.y)

    def has_ended(self, *reasons: str) -> bool:
        """Whether the adjoint solve has not converged, for one of these reasons or, of none, another."""
        unconverged = self.stats.converged is False and self.has_adjoint
        if not unconverged or self.has_large_residual:
            return False
        return self.stats.stopped in reasons if reasons else self.stats.stopped not in EXPLAINED


EXPLAINED = ("rounding", "stagnation")
"""Why a solve ended where more iterations do not help."""


@dataclass(frozen=True)
class WarningRule:
    """One kind of warning. It is kept back where a kind of `unless` holds, which explains it."""

    kind: str
    holds: Callable[[Step], bool]
    message: Callable[[Step], str]
    unless: tuple[str, ...] = ()


TABLE = (
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
        lambda step: step.has_ended("rounding"),
        lambda step: (
            "the adjoint solve has come as far as the dtype allows, to a relative residual of "
            f"{step.stats.residual:.2g}, and that is too far off; set estimator.damping, or use a "
            "wider dtype where there is one (runtime.dtype: float64)"
        ),
        unless=("curvature", "degenerate"),
    ),
    WarningRule(
        "adjoint",
        lambda step: step.has_ended("stagnation"),
        lambda step: (
            "the adjoint solve gains nothing more at a relative residual of "
            f"{step.stats.residual:.2g}, above its tolerance: the system is singular to working "
            "precision, or restarts forget too much; set estimator.damping, or raise "
            "estimator.solver.restart where there is one"
        ),
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
        "lower solve",
        lambda step: step.lower_error > max(LARGE * step.lower_size, 1e-6),
        lambda step: (
            f"the lower solve met its tolerance at ‖∇y G‖ = {step.lower.stats.gradient_norm:.1e}, "
            f"but with a curvature of {step.stats.curvature:.1e} that leaves y off by about "
            f"{step.lower_error:.1e}, where its length is {step.lower_size:.1e}: set "
            f"lower.tolerance to {_lower_tolerance(step):.0e}, or scale G up"
        ),
    ),
)


def found(step: Step) -> dict[str, str]:
    """The kinds of warning that hold at a step, with their messages, in the order of the table."""
    holding = [row for row in TABLE if row.holds(step)]
    kinds = {row.kind for row in holding}
    return {row.kind: row.message(step) for row in holding if not kinds.intersection(row.unless)}


def warn(setup: Setup, state: State, estimate: Estimate, lower: LowerSolution) -> Iterator[Warned]:
    """What is wrong with an estimate: said the first time, counted every time."""
    for kind, message in found(Step(setup.estimator, estimate, lower)).items():
        if kind not in state.warned:
            yield Warned(state.step, kind, message)
        state.warned[kind] = state.warned.get(kind, 0) + 1


def _remedy(estimator: Estimator) -> str:
    if hasattr(getattr(estimator, "lower", None), "steps"):
        return "raise estimator.lower.steps"
    solver = getattr(estimator, "solver", None)
    read = [name for name in ("iterations", "rank") if hasattr(solver, name)]
    if not read:
        return "take estimator: implicit, whose solver cg says when it has converged"
    other = "" if called(solver, "linear") == "cg" else ", or take estimator.solver: cg"
    return f"raise estimator.solver.{read[0]}{other}"


def _lower_tolerance(step: Step) -> float:
    """That leaves y off by a thousandth of its length."""
    return 1e-3 * (step.stats.curvature or 0.0) * max(step.lower_size, 1e-3)
