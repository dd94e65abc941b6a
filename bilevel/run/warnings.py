"""What a run warns of: the table of `bilevel.problem.trust`, each kind said the first time that it holds."""

from __future__ import annotations

from collections.abc import Iterator

from bilevel.events import Warned
from bilevel.problem.over_tasks import replay_refusal
from bilevel.problem.trust import Step, found
from bilevel.run import divergence
from bilevel.run.setup import Setup, State
from bilevel.types import Estimate, LowerSolution


def warn(setup: Setup, state: State, estimate: Estimate, lower: LowerSolution) -> Iterator[Warned]:
    """What is wrong with an estimate: said the first time, counted every time."""
    step = Step(setup.estimator, estimate, lower, state.x)
    kinds = found(step)
    if skipped := lower.stats.skipped:
        kinds["lower steps"] = lambda _: (
            f"{skipped} of the lower steps were left out, since G or its gradient was not finite "
            "(lower.nonfinite: skip)"
        )
    if diverging := divergence.note(state, estimate.value, lower.stats):
        kinds["divergence"] = lambda _: diverging
    if slower := replay_refusal(setup.problem):
        kinds["tasks"] = lambda _: slower
    for kind, message in kinds.items():
        if kind not in state.warned:
            yield Warned(state.step, kind, message(step))
        state.warned[kind] = state.warned.get(kind, 0) + 1
