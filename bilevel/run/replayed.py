"""`runtime.compile: step`: an upper step, recorded once and replayed.

A replay does the tensor operations that the step does, without the Python around them, and comes to
the same bits. Where a step takes another way than the one recorded (another number of iterations,
another shape of a batch, a number that is not finite) the replay departs, nothing of it is kept, and
the step is taken by itself, with the same batches, and recorded. So checks raise at the step that
they would raise at.

What Python remembers is in no tensor: a record itself, its first replay, some after it and the last one
before a state is saved or the run ends are compared with the step, bit by bit, and attributes of the problem
are looked at in each replay.

The step of x is part of the record, unless its rate changes from step to step, or Python that may remember
is called at it: an optimizer of `torch.optim` or of somebody's own, or the problem's `project_upper`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.events import Event, Traced, Warned
from bilevel.optimizers.differentiable import SGD, Adam, AdamW, RMSprop
from bilevel.replay.program import OTHERS, Departed, Draws, Feed, NotReplayable, Program, record
from bilevel.replay.python_state import PythonState
from bilevel.replay.regions import CannotCompile, Compiler
from bilevel.run.sameness import is_same, perturbed
from bilevel.run.setup import Setup, State
from bilevel.run.upper_step import Taken, moved, take_rounds

EVERY = 50
"""Replays from the first comparison with the step itself to the second; from each to the next twice as many."""
SPARSEST = 400
"""The most from one to the next: what they take is then a few hundredths of the replays."""
PAYS = 10
"""Replays of a record from which on it is compiled, which takes as long as thousands of them."""
LIMIT = 16
"""Records that are kept."""
TRIED = 4
"""Of those that were used last: what departs late costs most of a step."""
IN_VAIN = 5
"""Records beyond a quarter of the replays from which on none are made."""
SELDOM = 30
"""Replays in a row after which a departure is one of a rare kind, such as a full pass now and then."""
TIMES = 10
"""How often such a kind is met before it is recorded, which costs as much as some twenty of them."""

OTHER = (
    "from its record it comes to other bits than by itself: a loss or a component depends on what Python "
    "remembers (a counter, a global, an entry of a list), or torch computes an operation in another way "
    "while it is recorded"
)
FARTHER = (
    "compiled, its record comes to numbers that are farther from the step's than rounding: the loss or a "
    "component depends on what Python remembers, or the step on rounding so much that a compiler changes it"
)


class ReplayedSteps:
    """Upper steps from a record of one, where there is one that holds."""

    def __init__(self, is_whole: bool, compiler: Compiler | None = None) -> None:
        self._is_whole, self._compiler = is_whole, compiler
        self._programs: list[_Kept] = []
        self._recorded = self._replays = 0
        self._is_off = self._are_apart = False
        self._is_first = True
        self._met: Counter[str] = Counter()
        """Rare departures, by where."""
        self._in_a_row = 0
        self.news: list[Event] = []
        """What there is to say since it was last emptied."""

    def __call__(self, setup: Setup, state: State) -> Taken:
        # The first estimate has checks of its own. Where nothing is estimated the first step is that of this run.
        estimates = bool(state.x) or setup.estimator.needs.moves_lower
        begins = state.estimator is None and (estimates or self._is_first)
        self._is_first = False
        reason = None if self._is_off or begins or self._recorded else unfit(setup)
        if reason:
            self._end(state, reason)
        if self._is_off or begins:
            return moved(setup, state, *take_rounds(setup, state))
        feed = Feed({"upper": state.upper_batches, "lower": state.lower_batches})
        found = self._found(setup, state, feed)
        return found if self._is_whole else moved(setup, state, *found)

    def _found(self, setup: Setup, state: State, feed: Feed) -> Any:
        """What `moved` gives, or where the step of x is not in the record what `take_rounds` gives."""
        names = ("x", "y", "lower", "estimator", *(("upper",) if self._is_whole else ()))
        inputs, at = {name: getattr(state, name) for name in names}, state.step

        def step(inputs: Any, draws: Draws) -> Any:
            batches = {f"{level}_batches": source for level, source in draws.items()}
            here = replace(state, step=at, **inputs, **batches)
            solution, estimate = take_rounds(setup, here)
            solution = replace(solution, batch=None, path=None, pairs=None)
            found = solution, estimate
            return moved(setup, here, *found) if self._is_whole else found

        why = ""
        for kept in self._programs[:TRIED]:
            try:
                found = kept.replay(inputs, feed)
            except Departed as departed:
                why, feed = str(departed), Feed(feed.again())
                continue
            self._replays += 1
            self._in_a_row += 1
            if kept is not self._programs[0]:
                self._programs.remove(kept)
                self._programs.insert(0, kept)
            kept.unseen, kept.replays = kept.unseen + 1, kept.replays + 1
            last = _Last(at + 1, step, inputs, feed)
            if kept.unseen < kept.spacing and at + 1 < setup.upper.steps:
                kept.last, state.settle = last, self.settle
                return found
            kept.last, truth = None, step(inputs, feed.again())
            return self._compared(state, kept, truth, kept.holds(last, found, truth))
        return self._record(setup, state, step, inputs, feed, why)

    def settle(self) -> None:
        """Compare the last replay of each record with the step itself, where that was not done.

        Raises:
            ProblemError: they differ.
        """
        for kept in self._programs:
            kept.settle()

    def _record(
        self, setup: Setup, state: State, step: Any, inputs: Any, feed: Feed, why: str
    ) -> Any:
        if self._recorded > IN_VAIN + self._replays // 4:
            self._end(state, f"steps go on to depart from those recorded ({why})")
            return step(inputs, feed.again())
        seldom, self._in_a_row = self._in_a_row >= SELDOM, 0
        self._met[why] += seldom
        if seldom and self._met[why] < TIMES:
            return step(inputs, feed.again())
        self._are_apart |= why.startswith(OTHERS)
        began, feed = time.perf_counter(), Feed(feed.again(), copies=True)
        memory = PythonState(setup.problem)
        found, program, reason = None, None, ""
        try:
            found, program = record(step, inputs, feed.iterators(), apart=self._are_apart)
        except Exception as error:  # the step itself raises what is wrong with it
            if feed.has_failed:
                raise
            reason = _said(error)
        seconds = time.perf_counter() - began
        changed = memory.replaced()
        if changed and program is not None:  # batches that are drawn again change nothing
            self._end(state, f"the problem's {changed} changes within a step")
            return found
        if memory.added():  # what is made when it is first asked for, and then stays
            memory = PythonState(setup.problem)
        truth = step(inputs, feed.again())
        if feed.is_rewritten():
            reason = "batches of a step share memory, which later ones are written into"
        if program is None or reason or not is_same(found, truth):
            self._end(state, reason or OTHER)
            return truth
        self._recorded += 1
        for kept in self._programs[LIMIT - 1 :]:
            kept.settle()
        self._programs = [_Kept(program, memory, self._recorded), *self._programs[: LIMIT - 1]]
        self.news.append(Traced(state.step + 1, self._recorded, program.operations, why, seconds))
        return truth

    def _compared(self, state: State, kept: _Kept, truth: Any, holds: bool) -> Any:
        """The step itself, at the first replay and every so many, once that came to the same."""
        if not holds:
            if kept.by and not kept.is_trusted:
                self._say(state, kept.by, "what it compiled comes to other numbers than the step")
                kept.restore()
                return truth
            if kept.is_trusted:
                raise kept.error(state.step + 1)
            self._end(state, OTHER)
            return truth
        by = None if kept.is_settled else self._compiler
        if by and (by.is_exact or kept.replays > PAYS):
            self._compiled(state, kept, by)
            kept.is_trusted, kept.spacing = False, 1
        elif by:
            kept.is_trusted, kept.spacing = True, PAYS
        else:
            kept.spacing = min(2 * kept.spacing, SPARSEST) if kept.is_trusted else EVERY
            kept.is_trusted = True
        kept.unseen = 0
        return truth

    def _compiled(self, state: State, kept: _Kept, by: Compiler) -> None:
        """A record that comes to the same bits is compiled, and compared again at the next replay."""
        began = time.perf_counter()
        try:
            kept.compile(by)
        except CannotCompile as error:
            self._say(state, by, str(error))
            return
        seconds = time.perf_counter() - began
        self.news.append(Traced(state.step + 1, kept.number, kept.operations, by.done, seconds))

    def _say(self, state: State, by: Compiler, reason: str) -> None:
        message = f"{by.name}: a record is replayed operation by operation: {reason}"
        if by.kind not in state.warned:
            self.news.append(Warned(state.step + 1, by.kind, message))
        state.warned[by.kind] = 0

    def _end(self, state: State, reason: str) -> None:
        self.settle()
        self._is_off, self._programs = True, []
        message = f"runtime.compile: from here on steps are taken as with off: {reason}"
        if "compile" not in state.warned:
            self.news.append(Warned(state.step + 1, "compile", message))
        state.warned["compile"] = 0


@dataclass(frozen=True)
class _Last:
    """A step that was replayed, as it can be taken again."""

    number: int
    step: Any
    inputs: Any
    feed: Feed


class _Kept:
    """A record, and what Python remembered when it was made."""

    def __init__(self, program: Program, memory: PythonState, number: int) -> None:
        self._program, self._memory, self.number = program, memory, number
        self.unseen, self.spacing = 0, 1
        """Replays since the last comparison with the step; at how many the next is due."""
        self.replays = 0
        """All of them."""
        self.last: _Last | None = None
        """The last replay, where it was not compared."""
        self.is_trusted = False
        """Whether there was one that held."""
        self.is_settled = False
        """Whether it was compiled, or cannot be."""

    @property
    def operations(self) -> int:
        return self._program.operations

    @property
    def by(self) -> Compiler | None:
        return self._program.by

    def error(self, number: int) -> ProblemError:
        """That the replay of step `number` comes to something else than the step, where others did not."""
        other = FARTHER if self.by and not self.by.is_exact else OTHER
        return ProblemError(
            f"runtime.compile: step {number}: {other}. Up to {self.unseen - 1} steps before it may be others "
            "too: make the loss a function of (x, y, batch), or start again with runtime.compile: off"
        )

    def holds(self, last: _Last, found: Any, truth: Any) -> bool:
        """Whether what a replay came to is what the step itself came to."""
        near = self._near(last.inputs)
        if is_same(found, truth, near):
            return True
        if near is None:
            return False
        return is_same(found, truth, near, perturbed(last.step, last.inputs, last.feed, truth))

    def settle(self) -> None:
        """Compare the last replay with the step itself. Raises `ProblemError` where they differ."""
        last, self.last = self.last, None
        if last is None:
            return
        try:
            found = self.replay(last.inputs, Feed(last.feed.taken()))
        except Departed:  # an attribute has changed, or the memory of batches was written into
            return
        truth = last.step(last.inputs, last.feed.taken())
        if not self.holds(last, found, truth):
            raise self.error(last.number)
        self.unseen = 0

    def compile(self, by: Compiler) -> None:
        self.is_settled = True
        self._program.compile(by)

    def restore(self) -> None:
        self._program.restore()

    def _near(self, inputs: Any) -> float | None:
        """How close its results have to be to those of the step: the same bits, unless compiled to rounding."""
        if self.by is None or self.by.is_exact:
            return None
        single = torch.finfo(torch.float32).eps if self._program.is_single else 0.0
        return max(tree.eps(inputs["x"]), tree.eps(inputs["y"]), single) ** 0.5

    def replay(self, inputs: Any, feed: Feed) -> Any:
        """Raises `ProblemError` where a batch that is not the only one of the step changed what losses may read."""
        changed = self._memory.changed()
        if changed:
            raise Departed(f"the problem's {changed} has changed")
        found = self._program(inputs, feed)
        changed = self._memory.changed()
        if changed and feed.count() > 1:
            raise ProblemError(
                f"runtime.compile: the problem's {changed} changed as the batches of a step were drawn, and the step "
                "cannot be taken again as it was for each of them: change it elsewhere, or go on with "
                "runtime.compile: off"
            )
        if changed:
            raise Departed(f"the problem's {changed} has changed")
        return found


def unfit(setup: Setup) -> str | None:
    """Why no step of a run can be recorded, where that is known before."""
    if not setup.ranks.is_alone:
        return "sums over several ranks are no operations of one"
    if "episodes" in setup.levels and setup.upper.accumulate > 1:
        return "upper.accumulate with a problem of episodes draws in rounds"
    return None


def is_whole(setup: Setup) -> bool:
    """Whether the step of x is a function of tensors alone: no Python that may remember, and one rate."""
    is_ours = type(setup.upper.optimizer) in (SGD, Adam, AdamW, RMSprop)
    return is_ours and setup.upper.schedule is None and "project_upper" not in setup.levels


def _said(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, NotReplayable) else f"{type(error).__name__}: {text}"
