"""The run: lower steps, estimate, upper step, as a generator of events.

While the generator is suspended its state is still, so whoever drives it may save the state after
any event, and a test is `list(run(setup, state))`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from inspect import signature

from bilevel import tree
from bilevel.events import CAPTURED, COMPILED, Event, Finished, Started
from bilevel.replay.cuda_graph import by_cuda_graph, is_on_device
from bilevel.replay.inductor import by_inductor
from bilevel.replay.regions import Compiler
from bilevel.run.early_stop import ending, is_best, is_over
from bilevel.run.evaluation import draw_figures, evaluate, is_due
from bilevel.run.held import held
from bilevel.run.refusals import caution, refuse_mismatch
from bilevel.run.replayed import ReplayedSteps, is_whole
from bilevel.run.setup import Setup, State, nothing_to_settle, restore, start
from bilevel.run.unmoved import unmoved
from bilevel.run.upper_step import advance

__all__ = [
    "Setup",
    "State",
    "ending",
    "evaluate",
    "is_best",
    "is_due",
    "is_over",
    "prepare",
    "refuse_mismatch",
    "restore",
    "run",
    "start",
]


def prepare(setup: Setup) -> Iterator[Event]:
    """Refuse what cannot work, then let the problem do its slow work, then place it.

    What either draws from a global random state is of the seed.
    """
    refuse_mismatch(setup)
    work = setup.levels.get("prepare")
    if work:
        told, seeded = (
            (setup.device,) if signature(work).parameters else (),
            setup.seeded("prepare"),
        )
        with seeded:
            steps = work(*told)
        yield from seeded.each(iter(steps))
    place = setup.levels.get("place")
    if place:
        with setup.seeded("place"):
            told = place(setup.device, setup.dtype)
        yield from told if isinstance(told, list) else ()


def compiler_of(setup: Setup) -> Compiler | None:
    """What makes one call of many operations of a record."""
    if setup.compile == "inductor":
        return Compiler("inductor", "runtime.compile: inductor", by_inductor, COMPILED)
    if setup.compile == "off" or setup.device.type != "cuda":
        return None
    return Compiler(
        "cuda graph",
        "runtime.compile: step, on CUDA",
        by_cuda_graph,
        CAPTURED,
        is_exact=True,
        takes=is_on_device,
    )


def run(setup: Setup, state: State) -> Iterator[Event]:
    """Take the upper steps that are left, from `state`, which is advanced in place.

    Raises:
        ConvergenceError: a loss or a hypergradient is not finite; the message names the step, and
            the state is that of the last good step.

    Whatever is raised, `state.rewind()` makes of `state` what `State.save` may save: the run resumed
    from it takes the step that failed, or the measures, again.
    """
    began, steps = time.perf_counter(), setup.upper.steps
    yield Started(
        state.step,
        steps,
        setup.name,
        tree.size(state.x),
        tree.size(state.y),
        str(setup.device),
        str(setup.dtype).removeprefix("torch."),
    )
    yield from caution(setup, state)
    if state.step != state.evaluated and is_due(setup, state):  # not so after most resumptions
        yield from evaluate(setup, state)
    replayed = (
        None if setup.compile == "off" else ReplayedSteps(is_whole(setup), compiler_of(setup))
    )
    while not is_over(setup, state):
        yield from advance(setup, state, replayed)
        if replayed:
            yield from replayed.news
            replayed.news.clear()
        if is_due(setup, state):
            yield from evaluate(setup, state)
    state.settle()
    replayed = None  # and with it the memory of what was recorded
    state.settle = nothing_to_settle
    yield from unmoved(setup, state)
    yield from draw_figures(setup, state)
    if setup.evaluate_held and state.step:
        yield from held(setup, state.step)
    reason, why = ending(setup, state)
    yield Finished(state.step, reason, time.perf_counter() - began, dict(state.warned), why)
