"""What a run does where a loss or a derivative is not finite: end, leave the step out, or halve the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from bilevel import tree
from bilevel.errors import ConvergenceError
from bilevel.events import Stepped, Warned
from bilevel.run.setup import Setup, State
from bilevel.types import LowerStats, Stats

MOST = 10
"""Steps left out in a row, and halvings of one step, after which a run ends all the same."""

Take = Callable[[Setup, State], Any]


@dataclass(frozen=True)
class Answer:
    """What came of a step that failed; `state` is as it was until `settle` is called."""

    kind: str
    message: str
    recovery: dict[str, Any]
    found: Any = None
    """What a shorter step led to; None where it is left out."""

    def settle(self, state: State) -> Iterator[Warned]:
        """Said the first time, counted every time; once the step is done or left out."""
        state.recovery = self.recovery
        count = state.warned[self.kind] = state.warned.get(self.kind, 0) + 1
        message = self.message.removeprefix(f"step {state.step}: ")  # which the event says
        return iter([Warned(state.step, self.kind, message)] if count == 1 else [])


def _halt(setup: Setup, state: State, take: Take, error: ConvergenceError) -> NoReturn:
    raise error


def _skip(setup: Setup, state: State, take: Take, error: ConvergenceError) -> Answer:
    """x, y and the states of the solvers stay as they are; the batches are used up."""
    row = state.recovery.get("row", 0) + 1
    if row > MOST:
        raise ConvergenceError(
            f"{error}; so it was in the {MOST} steps before, which upper.nonfinite: skip left out"
        ) from error
    return Answer("skipped", f"{error}. The step is left out (upper.nonfinite: skip)", {"row": row})


def _halve(setup: Setup, state: State, take: Take, error: ConvergenceError) -> Answer:
    """Half the way back to the x that the last step was taken from, until a step can be taken.

    y and the states of the solvers are those that the last step left; each try draws batches.
    """
    before, here, failed = state.recovery.get("x"), state, error
    if before is None:
        raise ConvergenceError(
            f"{error}; upper.nonfinite: halve has no step before this to halve: begin elsewhere"
        ) from error
    project = setup.levels.get("project_upper")
    for tries in range(1, MOST + 1):
        x = tree.scale(0.5, tree.add(here.x, before))
        here = replace(here, x=project(x) if project else x)
        try:
            found = take(setup, here)
        except ConvergenceError as again:
            failed = again
            continue
        said = f"{error}. The step that led there is made {2**tries} times shorter"
        return Answer("halved", f"{said} (upper.nonfinite: halve)", {"x": here.x}, found)
    raise ConvergenceError(
        f"{failed}; also where upper.nonfinite: halve had made the step before {2**MOST} times shorter"
    ) from failed


ANSWERS: Mapping[str, Callable[[Setup, State, Take, ConvergenceError], Answer]] = {
    "halt": _halt,
    "skip": _skip,
    "halve": _halve,
}
"""By `upper.nonfinite`: (…, how a step is taken, why it failed) ↦ what came of it, or the error."""


def note(setup: Setup, state: State) -> None:
    """Keep what the answer to the next failure needs; `state` is still that before the step."""
    if setup.upper.nonfinite == "halve":
        state.recovery = {"x": state.x}
    elif state.recovery:
        state.recovery = {}


def left_out(state: State, seconds: float) -> Stepped:
    """The event of a step that was not taken: it has no numbers."""
    lower = LowerStats(0, 0, math.nan, math.nan)
    return Stepped(state.step, math.nan, math.nan, math.nan, lower, Stats(), state.totals, seconds)
