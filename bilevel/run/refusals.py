"""Combinations of problem, solver and estimator that cannot work, or are known to go wrong."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from bilevel import rng, tree
from bilevel.calculus.precision import require_resolved
from bilevel.errors import ProblemError
from bilevel.events import Warned
from bilevel.problem.purity import refuse_impure
from bilevel.run.setup import Setup, State
from bilevel.types import Counts, Estimator, Loss


def refuse_mismatch(setup: Setup) -> None:
    """Raise `ProblemError` for a combination that makes no sense, before anything slow."""
    estimator, lower = _names(setup)
    required = ("init", "upper_loss", "lower_loss", "upper_batches", "lower_batches")
    missing = [name for name in required if not callable(getattr(setup.problem, name, None))]
    if missing:
        raise ProblemError(
            f"{type(setup.problem).__name__} is no problem: it has no {', '.join(missing)}; "
            "see bilevel.problem.Problem"
        )
    _refuse_ignored_prox(setup)
    if setup.estimator.needs.path and not setup.lower.records:
        raise ProblemError(
            f"estimator {estimator} differentiates through the lower steps, "
            f"and those of lower: {lower} cannot be replayed; use lower: gradient with optimizer "
            f"sgd, adam, adamw or rmsprop, or estimator: {_instead(setup)}"
        )
    if setup.estimator.needs.pairs and not getattr(setup.lower, "gives_pairs", False):
        other = "" if hasattr(setup.problem, "project_lower") else "lower: lbfgs, or "
        raise ProblemError(
            f"estimator {estimator} reuses the curvature that a quasi-Newton "
            f"lower solver met, and lower: {lower} keeps none; use {other}"
            f"estimator: {_instead(setup)}"
        )
    for name in sorted(setup.estimator.needs.requires):
        if getattr(setup.problem, name, None) is None:
            raise ProblemError(
                f"estimator {estimator} is for problems that have {name}, and "
                f"{type(setup.problem).__name__} has none; add it, or use "
                f"estimator: {_instead(setup)}"
            )
    require_resolved(setup.estimator, [setup.dtype])
    _refuse_unheld(setup)


def _instead(setup: Setup) -> str:
    """The estimator that works wherever the one asked for does not."""
    return "fixed_point" if hasattr(setup.problem, "project_lower") else "implicit"


def _refuse_ignored_prox(setup: Setup) -> None:
    """Without R in G + R, whatever is differentiated belongs to another problem."""
    estimator = setup.estimator
    uses = estimator.claim != "direct" or estimator.needs.moves_lower
    if uses and unknown_to(estimator, setup.problem) == "prox_lower":
        raise ProblemError(
            f"estimator {_names(setup)[0]} does not know prox_lower, so it would "
            "differentiate the lower level without it; use estimator: fixed_point"
        )


def _refuse_unheld(setup: Setup) -> None:
    """Nothing may move y that does not know what holds it."""
    problem, needs = setup.problem, setup.estimator.needs
    estimator, lower = _names(setup)
    prox = hasattr(problem, "prox_lower")
    if needs.moves_upper and hasattr(problem, "project_upper"):
        raise ProblemError(
            f"estimator {estimator} moves x itself and knows no project_upper, "
            "so what it accepts is not where x would be; use estimator: implicit"
        )
    unknown = "project_lower" not in needs.knows
    if hasattr(problem, "project_lower") and needs.moves_lower and unknown:
        raise ProblemError(
            f"estimator {estimator} moves y itself and knows no project_lower, "
            "so y would leave its set; use estimator: fixed_point, or unroll"
        )
    if prox and not getattr(setup.lower, "takes_prox", False):
        raise ProblemError(
            f"the problem has prox_lower, and lower: {lower} would ignore it; use lower: proximal"
        )
    if not _only_constrained(problem):
        return
    if needs.moves_lower and "lower_constraints" not in needs.knows:
        raise ProblemError(
            f"estimator {estimator} moves y itself and knows no "
            "lower_constraints, so y would not keep to them; use estimator: kkt, or regularised_gap"
        )
    if not needs.moves_lower and not getattr(setup.lower, "takes_constraints", False):
        raise ProblemError(
            "the problem has lower_constraints and neither project_lower nor prox_lower, and "
            f"lower: {lower} would not keep y within them; use lower: augmented_lagrangian, or "
            "add the projection"
        )


def _only_constrained(problem: Any) -> bool:
    """Whether lower_constraints are all that says where y is held."""
    others = hasattr(problem, "project_lower") or hasattr(problem, "prox_lower")
    return hasattr(problem, "lower_constraints") and not others


def caution(setup: Setup, state: State) -> Iterator[Warned]:
    """What is known to go wrong before the first step; raises where it cannot go right."""
    if state.step:
        return
    problem, stream = setup.problem, rng.stream(setup.seed, "inspection")
    counts = Counts()
    for loss, make in (
        (Loss(problem.upper_loss, None, counts, "upper"), problem.upper_batches),
        (Loss(problem.lower_loss, None, counts, "lower"), problem.lower_batches),
    ):
        batch = tree.to(next(iter(make(stream)), None), setup.device, setup.dtype)
        refuse_impure(loss.on(batch), state.x, state.y)
    known = getattr(setup.estimator, "caution", None)
    if known:
        state.warned["estimator"] = 0
        yield Warned(0, "estimator", known)
    name = unknown_to(setup.estimator, problem)
    if name and setup.estimator.claim in ("solution", "penalty"):
        state.warned["projection"] = 0
        yield Warned(
            0,
            "projection",
            f"{name} shapes the lower solution, and {_names(setup)[0]} does not know "
            "it: the hypergradient is wrong where it is active; estimator: fixed_point knows, "
            "unroll a projection, kkt what lower_constraints says",
        )


def unknown_to(estimator: Estimator, problem: Any) -> str | None:
    """What holds a problem's y that the estimator does not take into account, if anything."""
    held = ("project_lower", "prox_lower", "lower_constraints")
    return estimator.needs.unknown([name for name in held if hasattr(problem, name)])


def _names(setup: Setup) -> tuple[str, str]:
    """The estimator and the lower solver as a recipe names them."""
    return called(setup.estimator, "estimators"), called(setup.lower, "lower")


def called(component: Any, group: str) -> str:
    """The name that a component's class is registered by; the class where it is not."""
    cls = type(component)
    here = f"{cls.__module__}:{cls.__qualname__}"
    points = importlib.metadata.entry_points(group=f"bilevel.{group}")
    return next((point.name for point in points if point.value == here), cls.__name__)
