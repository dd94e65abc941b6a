"""This library, through the functional core."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from bilevel import hypergradient
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.unroll import Unroll
from bilevel.events import Stepped
from bilevel.linear.cg import CG
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.run import engine
from bilevel.run import replayed as replayed_steps
from bilevel.run.setup import Setup
from bilevel.types import Point
from tests.benchmarks import loop, maml, stochastic
from tests.benchmarks.hold import Held
from tests.benchmarks.products import ASKED, At
from tests.benchmarks.tasks import EPSILON, SCALE, Params, Task
from tests.benchmarks.whole import Loop, Maml, Prepared


def ask(task: Task, estimator) -> Params:
    return hypergradient(
        task.upper,
        task.lower,
        task.x,
        task.y,
        estimator=estimator,
        upper_batch=task.held_out,
        lower_batch=task.train,
        state=estimator.init(Point(task.x, task.y)),
    ).hypergradient


def cg(task: Task) -> Params:
    return ask(task, Implicit(solver=CG(iterations=task.work, tolerance=0.0)))


def neumann(task: Task) -> Params:
    # the first of our terms needs no product
    return ask(task, Implicit(solver=Neumann(iterations=task.work + 1, scale=SCALE)))


def unroll(**options):
    def run(task: Task) -> Params:
        optimizer = SGD(lr=task.lr, momentum=task.momentum)
        steps = Gradient(steps=task.work, optimizer=optimizer)
        return ask(task, Unroll(along=steps, **options))

    return run


def one_step(task: Task) -> Params:
    return ask(task, OneStep(lr=task.lr, finite_difference=True, epsilon=EPSILON))


LONG = 1_000_000
"""Upper steps of a run that is timed piece by piece."""
WARM_UP = 5
"""Its first steps, with the checks that are made once, the record and its compilation: not timed."""
PASSES = 12
"""Periods of SRBA that are not timed: its full pass is recorded at the tenth time, compiled and compared at the next two."""
replayed_steps.PAYS = 0  # so that the first steps are few


class Stepping:
    """The upper steps of a run, event by event as `bilevel run` drives it; called, `steps` of them."""

    def __init__(
        self, make: Callable[[Any, int], Setup], task: Any, warm_up: int, steps: int = LONG
    ) -> None:
        self._make, self._task, self._warm_up, self._steps = make, task, warm_up, steps
        self.begin()

    def begin(self) -> None:
        """From the start, which is not timed."""
        setup = self._make(self._task, self._steps)
        self._state = engine.start(setup)
        self._events = engine.run(setup, self._state)
        if self._steps == LONG:
            self.advance(self._warm_up)

    def advance(self, steps: int) -> Params:
        for event in self._events:
            steps -= isinstance(event, Stepped)
            if not steps:
                break
        return self._state.x

    def __call__(self) -> Params:
        return self.advance(self._task.steps)


class Again(Stepping):
    """Those of a run that goes no further than a call: each is from the start."""

    def again(self) -> None:
        self.begin()


def steps_of(
    make: Callable[[Any, int], Setup], warm_up: int = WARM_UP, kind: type[Stepping] = Stepping
) -> Prepared[Any]:
    return Prepared(
        lambda task: kind(make, task, warm_up),
        lambda task: Stepping(make, task, warm_up, task.steps)(),
    )


def maml_estimate(task: Maml) -> Callable[[], Params]:
    return maml.as_a_run(task.num_tasks, task.dtype)


class HoldsError:
    """`target_error` along the points of a run, with nothing else asked."""

    def __init__(self, task: Held) -> None:
        self._task, self._state, self._spent = task, None, 0
        self._found = {f"{k:03}": self._at(point) for k, point in enumerate(task.points)}

    def _at(self, point: At) -> Tensor:
        got = point.ask(ASKED, self._state)
        # one cross product is in every hypergradient, and counted for no method
        self._state, self._spent = (
            got.state,
            self._spent + got.stats.hvps + got.stats.cross_products - 1,
        )
        return got.hypergradient["log_penalty"]

    def products(self) -> int:
        return self._spent

    def __call__(self) -> Params:
        return self._found


def whole_loop(task: Loop, steps: int, **options: Any) -> Setup:
    return loop.setup(steps, **options)


def replayed(make: Callable[..., Setup], mode: str = "step", **options: Any) -> Prepared[Any]:
    """The same with the upper step recorded once, and compiled, in the steps that are not timed."""
    return steps_of(partial(make, compile=mode), **options)


STOCHASTIC = steps_of(stochastic.setup)
AFTER_PASSES = {"warm_up": PASSES * stochastic.PERIOD + WARM_UP}
METHODS = {
    "bilevel": {
        "cg": cg,
        "neumann": neumann,
        "one step": one_step,
        "products": Prepared(HoldsError),
        "loop": steps_of(whole_loop, kind=Again),
        "maml": Prepared(maml_estimate),
        **dict.fromkeys(("soba", "saba", "srba"), STOCHASTIC),
    },
    "bilevel, compile: step": {
        "loop": replayed(whole_loop, kind=Again),
        **dict.fromkeys(("soba", "saba"), replayed(stochastic.setup)),
        "srba": replayed(stochastic.setup, **AFTER_PASSES),
    },
    "bilevel, compile: inductor": {
        "loop": replayed(whole_loop, "inductor", kind=Again),
        **dict.fromkeys(("soba", "saba"), replayed(stochastic.setup, "inductor")),
        "srba": replayed(stochastic.setup, "inductor", **AFTER_PASSES),
    },
    "bilevel, store": {"unroll": unroll()},
    "bilevel, recompute": {"unroll": unroll(memory="recompute")},
    "bilevel, traced": {"unroll": unroll(memory="traced")},
    "bilevel, mixed": {"unroll": unroll(memory="mixed")},
    "bilevel, checkpoint": {"unroll": unroll(memory="checkpoint")},
    "bilevel, reversible": {"unroll": unroll(memory="reversible")},
}
