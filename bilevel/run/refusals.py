"""Combinations of problem, solver and estimator that cannot work, or are known to go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from bilevel import registry, rng, tree
from bilevel.calculus.precision import require_resolved
from bilevel.errors import ConvergenceError, ProblemError, require_kind
from bilevel.events import Warned
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.adjusted import Adjusted
from bilevel.optimizers.learned import learned
from bilevel.problem.levels import Levels, require_offers
from bilevel.problem.purity import refuse_impure
from bilevel.problem.signatures import misspelt, refuse_arguments
from bilevel.run.batches import first_batch
from bilevel.run.early_stop import watched
from bilevel.run.setup import Setup, State
from bilevel.types import Counts, Estimator, Loss, Needs, Offers, Params
from bilevel.unrolling.path import refuse_learned


def refuse_mismatch(setup: Setup) -> None:
    """Raise `ProblemError` for a combination that makes no sense, before anything slow."""
    refuse_arguments(setup.levels.problem)
    needs, offers, levels = setup.estimator.needs, setup.lower.offers, setup.levels
    require_kind(needs, Needs, f"{type(setup.estimator).__name__}.needs")
    require_kind(offers, Offers, f"{type(setup.lower).__name__}.offers")
    estimator, lower = _names(setup)
    _refuse_ignored_prox(setup)
    _refuse_own_rows(setup)
    _refuse_parts(setup)
    refuse_learned(setup.estimator, offers.learned)
    if learned(setup.upper.optimizer):
        raise ProblemError(
            f"upper.optimizer takes {', '.join(learned(setup.upper.optimizer))} from x, and only the "
            "steps of lower: gradient are differentiated in it; give a number"
        )
    _refuse_upper(setup, estimator)
    for name, _ in watched(setup):
        if "evaluate" not in levels:
            raise ProblemError(
                f"{name} looks at the problem's own measures, and {type(setup.problem).__name__} has "
                f"no evaluate; add one, or take {name} out"
            )
    if needs.path and not offers.path:
        raise ProblemError(
            f"estimator {estimator} differentiates through the lower steps, "
            f"and those of lower: {lower} cannot be replayed; use lower: gradient with optimizer "
            f"sgd, adam, adamw or rmsprop, or estimator: {_instead(levels)}"
        )
    if needs.pairs and not offers.pairs:
        other = "" if "project_lower" in levels else "lower: lbfgs, or "
        raise ProblemError(
            f"estimator {estimator} reuses the curvature that a quasi-Newton "
            f"lower solver met, and lower: {lower} keeps none; use {other}"
            f"estimator: {_instead(levels)}"
        )
    for name in sorted(needs.requires):
        if name not in levels:
            raise ProblemError(
                f"estimator {estimator} is for problems that have {name}, and "
                f"{type(setup.problem).__name__} has none; add it, or use "
                f"estimator: {_instead(levels)}"
            )
    require_resolved(setup.estimator, [setup.autocast or setup.dtype])
    _refuse_ignored_restrictions(setup)


def _refuse_upper(setup: Setup, estimator: str) -> None:
    """What `upper` asks for and the estimator, or the schedule, has no place for."""
    upper, needs = setup.upper, setup.estimator.needs
    given = {"schedule": upper.schedule, "clip": upper.clip}
    asked = [name for name, part in given.items() if part is not None]
    if needs.moves_upper and asked:
        raise ProblemError(
            f"estimator {estimator} chooses the step of x itself, so upper.{asked[0]} would do "
            f"nothing; leave it out, or use estimator: {_instead(setup.levels)}"
        )
    if upper.accumulate > 1 and (needs.moves_lower or needs.moves_upper):
        raise ProblemError(
            f"estimator {estimator} moves y with every hypergradient, so upper.accumulate = "
            f"{upper.accumulate} of them are not taken at one point; use larger batches, or "
            f"estimator: {_instead(setup.levels)}"
        )
    if getattr(setup.lower, "accumulate", 1) > 1 and "episodes" in setup.levels:
        raise ProblemError(
            "a lower solve is on the batch of its episode, so lower.accumulate would take the mean of "
            "one batch; use upper.accumulate, the mean over several episodes"
        )
    _foresee(setup)


def _foresee(setup: Setup) -> None:
    """Raise `ProblemError` where a schedule ends before the run does."""
    upper, lower, name = setup.upper, setup.lower, "upper.schedule"
    try:
        upper.scheduled(min(upper.steps, FORESEEN) - 1)
        name = "lower.schedule"
        if isinstance(lower, Gradient) and lower.schedule is not None:
            restarts = "lower_start" in setup.levels or lower.schedule_over == "solve"
            last = lower.steps if restarts else lower.steps * upper.steps
            Adjusted(lower.optimizer, None, lower.schedule).foresee(min(last, FORESEEN))
    except ProblemError as error:
        raise ProblemError(
            f"{name}: {error}; the run has {upper.steps} upper steps, see upper.steps and lower.steps"
        ) from error


FORESEEN = 10_000
"""Steps that a schedule is followed for before a run begins: 10 µs each."""


def refuse_empty_upper(x: Params) -> None:
    """Raise `ProblemError` where there is nothing that a hypergradient could be taken in."""
    if not x:
        raise ProblemError(
            "x is empty: with one level only there is no hypergradient to check or to compare. "
            "`bilevel run` lowers G alone, or F over argmin G with an estimator that moves y: "
            "dynamic_barrier, or rising_penalty"
        )


def _instead(levels: Levels) -> str:
    """The estimator that works wherever the one asked for does not."""
    if "project_lower" in levels:
        return "fixed_point"
    if "lower_constraints" in levels:
        return "kkt"
    return "fixed_point" if "prox_lower" in levels else "implicit"


def _refuse_ignored_prox(setup: Setup) -> None:
    """Without R in G + R, whatever is differentiated belongs to another problem."""
    estimator = setup.estimator
    uses = estimator.claim != "direct" or estimator.needs.moves_lower
    if uses and ignored_by(estimator, setup.levels) == "prox_lower":
        raise ProblemError(
            f"estimator {_names(setup)[0]} does not support prox_lower and would "
            "differentiate the lower level without it; use estimator: fixed_point"
        )


def _refuse_own_rows(setup: Setup) -> None:
    """A component that looks inside a loss, and does not sum over ranks what it finds there."""
    if setup.ranks.is_alone:
        return
    for part in _components(setup):
        if getattr(part, "own_rows", False):
            raise ProblemError(
                f"{type(part).__name__} sees the rows of its own rank alone, so that each of the "
                f"{setup.ranks.size} ranks would take another step: have it sum what it sees by "
                "bilevel.ranks.here().sum([...]) and take `own_rows` out of it, or use another, or "
                "one rank"
            )


def _refuse_parts(setup: Setup) -> None:
    """A component that takes y as one vector, where each rank holds its rows of every entry alone."""
    team = setup.ranks.team
    if team is None:
        return
    for part in _components(setup):
        if instead := getattr(part, "needs_whole", ""):
            raise ProblemError(
                f"{type(part).__name__} works with all of y at once, and with runtime.mesh.shard = "
                f"{team.within.size} each rank holds its rows of every entry alone; use {instead}, or "
                "set runtime.mesh.shard=1"
            )


def _components(setup: Setup) -> Iterator[Any]:
    """The components of a run, and what they are made of."""
    left: list[Any] = [setup.estimator, setup.lower, setup.upper.optimizer]
    while left:
        part = left.pop()
        yield part
        if is_dataclass(part):
            left += [getattr(part, entry.name) for entry in fields(part)]


_MOVES_Y = {
    "project_lower": "fixed_point, or unroll",
    "prox_lower": "fixed_point",
    "lower_constraints": "kkt, or regularised_gap",
}
"""By restriction of y: estimators to take in place of one that moves y itself and ignores it."""


def _refuse_ignored_restrictions(setup: Setup) -> None:
    """A method that moves x or y must respect the projection, proximal map and constraints."""
    needs, levels = setup.estimator.needs, setup.levels
    estimator, _ = _names(setup)
    if needs.moves_upper and "project_upper" in levels:
        raise ProblemError(
            f"estimator {estimator} moves x itself and does not support project_upper, "
            "so what it accepts is not where x would be; use estimator: implicit"
        )
    if needs.moves_lower:
        ignored = ignored_by(setup.estimator, levels)
        if "project_lower" in levels and "project_lower" not in needs.supports:
            ignored = "project_lower"
        if ignored:
            raise ProblemError(
                f"estimator {estimator} moves y itself and does not support {ignored}, so y would "
                f"leave the set; use estimator: {_MOVES_Y[ignored]}"
            )
        return
    require_offers(setup.lower, levels.structure)


def caution(setup: Setup, state: State) -> Iterator[Warned]:
    """What is known to go wrong before the first step; raises where it cannot go right."""
    if state.step:
        return
    problem, stream = setup.problem, rng.stream(setup.seed, "inspection")
    counts, loose = Counts(), list[str]()
    policies = setup.upper.nonfinite, getattr(setup.lower, "nonfinite", "halt")
    for loss, make in (
        (Loss(problem.upper_loss, None, counts, "upper"), problem.upper_batches),
        (Loss(problem.lower_loss, None, counts, "lower"), problem.lower_batches),
    ):
        drawn, is_repeatable = first_batch(make, stream)
        batch = tree.to(drawn, setup.device, setup.dtype)
        loose += [] if is_repeatable else [f"{loss.level}_batches"]
        # a batch that is not finite is what `skip` is for
        with suppress(*[ConvergenceError] if "skip" in policies else []):
            refuse_impure(loss.on(batch), state.x, state.y)
    restart = setup.levels.restart(state.y)
    if restart and rng.inspected(lambda: restart(state.x))[1]:
        loose.append("lower_start")
    if loose:
        state.warned["global draws"] = 0
        yield Warned(
            0,
            "global draws",
            f"{' and '.join(loose)} draw from the global random state of torch, numpy or random, which is "
            "not of the seed: another run of this recipe is another one, and this one cannot be resumed. "
            "Batches are to be drawn from the given stream (a DataLoader that shuffles takes generator=stream), "
            "and with them what a start needs",
        )
    if close := misspelt(problem):
        state.warned["misspelt"] = 0
        yield Warned(0, "misspelt", "; ".join(close))
    needs = setup.estimator.needs
    if not state.x and not needs.moves_lower and setup.estimator.claim != "direct":
        state.warned["one level"] = 0
        yield Warned(
            0,
            "one level",
            f"x is empty, so estimator {_names(setup)[0]} has nothing to estimate: lower minimises G "
            "and F is only watched. estimator: dynamic_barrier or rising_penalty lowers F over argmin "
            "G; alternating says that G alone is meant",
        )
    known = needs.caution
    if known:
        state.warned["estimator"] = 0
        yield Warned(0, "estimator", known())
    name = ignored_by(setup.estimator, setup.levels)
    if name and setup.estimator.claim in ("solution", "penalty"):
        state.warned["projection"] = 0
        yield Warned(
            0,
            "projection",
            f"{name} restricts y, and {_names(setup)[0]} does not support it: the hypergradient is "
            "wrong where it is active. estimator: fixed_point supports project_lower and "
            "prox_lower, unroll project_lower, kkt lower_constraints",
        )


def ignored_by(estimator: Estimator, levels: Levels) -> str | None:
    """What restricts a problem's y and the estimator would ignore, if anything."""
    return estimator.needs.ignored(levels.structure.restrictions)


def _names(setup: Setup) -> tuple[str, str]:
    """The estimator and the lower solver as a recipe names them."""
    return called(setup.estimator, "estimators"), called(setup.lower, "lower")


def called(component: Any, group: str) -> str:
    """The name that a component's class is registered by; the class where it is not."""
    cls = type(component)
    here = f"{cls.__module__}:{cls.__qualname__}"
    known = registry.references(group).items()
    return next((name for name, value in known if value == here), cls.__name__)
