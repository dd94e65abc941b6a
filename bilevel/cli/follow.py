"""What a rank other than the first does in a run: it computes. It has no folder, no sinks and no reports."""

from __future__ import annotations

from pathlib import Path

from bilevel.cli.boundary import Stopped, requiring
from bilevel.cli.run_loop import is_settled
from bilevel.cli.signals import Signals
from bilevel.cli.user_code import explaining
from bilevel.events import HELD, Progress
from bilevel.run import engine
from bilevel.run.engine import Setup, State
from bilevel.runfolder import checkpoint


def follow(setup: Setup, signals: Signals, found: Path | None = None) -> None:
    """Take the steps that the first rank takes, from its checkpoint if there is one, and end with it."""
    with explaining(), requiring(f"problem {type(setup.problem).__name__}"):
        for _ in engine.prepare(setup):
            pass
        if found is None:
            state = engine.start(setup)
        else:
            state = engine.restore(setup, checkpoint.load(found))
    signals.is_patient = True
    with explaining(lambda: f" in step {state.step + 1}"):
        if _is_stopped(setup, state, signals):
            raise Stopped(signals.code)


def take_part(setup: Setup, state: State) -> None:
    """Give the first rank the parts of what it saves here, if ranks hold the state together."""
    while setup.ranks.team is not None and setup.ranks.from_first():
        state.save()


def _is_stopped(setup: Setup, state: State, signals: Signals) -> bool:
    """Whether a signal ended the run before its end; asked exactly where the first rank asks."""
    for event in engine.run(setup, state):
        if isinstance(event, Progress) and event.stage == HELD:
            if signals.agree(setup.ranks):
                return False
            continue
        if not is_settled(event, setup, state):
            continue
        take_part(setup, state)
        if not engine.is_over(setup, state) and signals.agree(setup.ranks):
            take_part(setup, state)
            return True
    return False
