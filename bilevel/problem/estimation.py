"""The one call of an estimator, with every check of what goes in and what comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.fixed_point_maps import reached
from bilevel.calculus.precision import require_resolved
from bilevel.errors import CheckError, ConvergenceError, ProblemError, require_kind
from bilevel.optimizers.learned import upper_entries
from bilevel.problem.purity import refuse_impure
from bilevel.problem.second_derivatives import refuse_missing_second_derivative
from bilevel.problem.states import require_state
from bilevel.scalars.functions import clock
from bilevel.types import Counts, Estimate, Estimator, Losses, Moved, Point, Stats, changed
from bilevel.unrolling.path import refuse_learned, require_steps


def estimate(estimator: Estimator, losses: Losses, at: Point, state: Any) -> Estimate:
    """The estimator's answer at a point. `state` None begins with a new one, and checks the losses first.

    Raises:
        ProblemError: a loss is not a function of (x, y, batch) or has no second derivative, an upper
            variable reaches neither, the dtype is too coarse for what the estimator subtracts, or
            lower steps that it follows were not recorded.
        ConvergenceError: a loss or the hypergradient is not finite, or the adjoint solve diverges.
        CheckError: it returned no `Estimate`, or other names, shapes or dtypes than those of x.
    """
    began, first = clock(), state is None
    require_resolved(estimator, (e.dtype for params in (at.x, at.y) for e in params.values()))
    require_steps(at.path, estimator.needs.path, type(estimator).__name__)
    refuse_learned(estimator, upper_entries(at.path.optimizer, at.x) if at.path else {})
    if first:
        for loss in (losses.upper, losses.lower):
            refuse_impure(loss, at.x, at.y)
        if estimator.needs.second_order and losses.lower.structure.map is None:
            refuse_missing_second_derivative(losses.lower, at)
        state = estimator.init(at)
    try:
        found = estimator.estimate(losses, at, state)
    except (KeyError, RuntimeError):
        for params in (at.x, at.y):
            require_state(state, params, "the state")
        raise
    _require_answer(estimator, found, at)
    if first:
        _require_reached(losses, at)
    if not tree.is_finite(found.hypergradient):
        bad = [n for n, entry in found.hypergradient.items() if not entry.isfinite().all()]
        raise ConvergenceError(
            f"the hypergradient of {', '.join(bad)} is not finite, the losses are; "
            "more damping, a shorter path or float64 may help"
        )
    counts = losses.counts
    stats = changed(
        found.stats,
        gradients=counts.gradients,
        hvps=counts.hvps,
        cross_products=counts.cross_products,
        seconds=clock() - began,
    )
    return changed(found, stats=stats)


def _require_answer(estimator: Estimator, found: Any, at: Point) -> None:
    """Raise `CheckError` where what an estimator, which may be somebody's own, returned is no answer."""
    name = f"{type(estimator).__name__}.estimate"
    if type(found) is not Estimate:
        require_kind(found, Estimate, f"what {name} returns")
    if type(found.stats) is not Stats:
        require_kind(found.stats, Stats, f"the stats that {name} returns")
    if not tree.is_like(found.hypergradient, at.x):
        form = f"{name} must return a hypergradient with the form of x,"
        raise tree.unlike(found.hypergradient, at.x, form)
    if not isinstance(found.value, Tensor) or found.value.numel() != 1:
        raise CheckError(
            f"{name} must return F as its value, a tensor of one number; got {tree.formed(found.value)}"
        )
    if (moved := found.moved) is not None:
        if type(moved) is not Moved:
            require_kind(moved, Moved, f"the moved that {name} returns")
        if not tree.is_like(moved.y, at.y):
            raise tree.unlike(moved.y, at.y, f"{name} must return the y that it moved")


def _require_reached(losses: Losses, at: Point) -> None:
    """An upper variable that influences neither loss is a wiring mistake: name it."""
    missing = at.x.keys() - losses.counts.reached
    if not missing:
        return
    apart = Counts()
    for loss in (losses.upper, losses.lower):
        calculus.gradient_x(replace(loss, counts=apart), at.x, at.y)
    missing = sorted(missing - apart.reached - reached(losses.lower, at))
    if missing:
        raise ProblemError(
            f"upper variable {', '.join(missing)} reaches neither loss, so its hypergradient "
            "would always be zero: use it in upper_loss or lower_loss, or take it out of x "
            "(a .detach(), .item(), a copy into a module, or torch.no_grad() cuts it off). One "
            "that says where the lower level starts, or how it steps (Learned), and nothing else, "
            "needs estimator=unroll. "
            "Where it is meant to reach neither, add 0 * x[...].sum() to upper_loss"
        )
