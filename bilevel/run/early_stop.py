"""What a run watches of its measures: whether to end early, and which state is the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bilevel.errors import RecipeError, unknown
from bilevel.events import EARLY
from bilevel.run.setup import Setup, State
from bilevel.run.targets import Best, EarlyStop


def watched(setup: Setup) -> Iterator[tuple[str, EarlyStop | Best]]:
    """(what it is called in a recipe, what it is) of all that is watched."""
    for name, target in (("evaluate.stop", setup.stop), ("checkpoint.best", setup.best)):
        if target is not None:
            yield name, target


def watch(setup: Setup, state: State, found: Mapping[str, float]) -> None:
    """Note the measures that were just taken.

    Raises:
        RecipeError: one that is watched is not among them.
    """
    for name, target in watched(setup):
        if target.measure not in found:
            kind = type(setup.problem).__name__
            raise RecipeError(
                f"{name}.measure = {unknown(target.measure, found, f'measure of {kind}')}"
            )
        value = float(found[target.measure])
        state.watched[name] = _after(state.watched.get(name), value, state.step, target)


def _after(
    seen: dict[str, Any] | None, value: float, step: int, target: EarlyStop | Best
) -> dict[str, Any]:
    first = {"value": value, "step": step, "waited": 0}
    if seen is None or (math.isnan(seen["value"]) and not math.isnan(value)):
        return first
    gain = value - seen["value"] if target.mode == "max" else seen["value"] - value
    if gain > getattr(target, "min_delta", 0.0):
        return first
    return {**seen, "waited": seen["waited"] + 1}


def is_over(setup: Setup, state: State) -> bool:
    """Whether the run is to take no step more."""
    return state.step >= setup.upper.steps or stopped(setup, state) is not None


def stopped(setup: Setup, state: State) -> str | None:
    """Why the run ends early, None where it does not."""
    seen = state.watched.get("evaluate.stop")
    if setup.stop is None or seen is None or seen["waited"] < setup.stop.patience:
        return None
    moved = "risen above" if setup.stop.mode == "max" else "fallen below"
    by = f" by more than {setup.stop.min_delta:g}" if setup.stop.min_delta else ""
    return (
        f"{setup.stop.measure} has not {moved} the {seen['value']:.4g} of step {seen['step']}{by} in "
        f"{seen['waited']} evaluations"
    )


def ending(setup: Setup, state: State) -> tuple[str, str]:
    """(how a run that has come to its end is called, why)."""
    early = stopped(setup, state)
    return (EARLY, early) if early else ("done", "")


def is_best(state: State) -> bool:
    """Whether the measures that were just taken are the best so far."""
    seen = state.watched.get("checkpoint.best")
    return seen is not None and seen["step"] == state.step == state.evaluated
