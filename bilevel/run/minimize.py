"""A run without a recipe and without a file: `minimize` drives it, `iterate` lets you drive it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, cast

import torch

from bilevel import tree
from bilevel.events import Drawn, Evaluated, Event, Finished, Held, Stepped, Warned
from bilevel.problem.nested_variables import NestedVariables
from bilevel.problem.protocol import Problem
from bilevel.registry.build import made, resolve
from bilevel.run import engine, placement
from bilevel.run.options import require
from bilevel.run.result import BestPoint, Result
from bilevel.run.setup import Setup, State
from bilevel.run.targets import Best, EarlyStop
from bilevel.run.upper import Upper
from bilevel.sinks.progress import progress as shown
from bilevel.types import Estimator, LowerSolver, Named, Optimizer


class Iteration(Iterator[Event]):
    """The events of a run, one after the other; x, y and the history are read in between."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.state: State | None = None
        self._history: list[Stepped] = []
        self._evaluations: list[Evaluated] = []
        self._held: Mapping[str, float] = {}
        self._warned: list[Warned] = []
        self._figures: dict[str, Any] = {}
        self._best: BestPoint | None = None
        self._reason = "unfinished"
        self._events = self._run()

    def _run(self) -> Iterator[Event]:
        yield from engine.prepare(self.setup)
        self.state = engine.start(self.setup)
        yield from engine.run(self.setup, self.state)

    def __next__(self) -> Event:
        event = next(self._events)
        if isinstance(event, Stepped):
            self._history.append(event)
        elif isinstance(event, Evaluated):
            self._evaluations.append(event)
            if self.state and engine.is_best(self.state):
                x, y = (tree.map_nested(torch.clone, params) for params in (self.x, self.y))
                self._best = BestPoint(event.step, event.metrics, x, y)
        elif isinstance(event, Held):
            self._held = event.metrics
        elif isinstance(event, Warned):
            self._warned.append(event)
        elif isinstance(event, Drawn):
            self._figures[event.name] = event.figure
        elif isinstance(event, Finished):
            self._reason = event.reason
        return event

    @property
    def x(self) -> Any:
        """The upper variables after the last step; empty before the run has started."""
        return self._given("x")

    @property
    def y(self) -> Any:
        """The lower variables after the last step; empty before the run has started."""
        return self._given("y")

    def _given(self, level: Literal["x", "y"]) -> Any:
        """Variables in the containers that the problem's `init` gave them in."""
        if self.state is None:
            return {}
        params, problem = dict(getattr(self.state, level)), self.setup.problem
        nested = isinstance(problem, NestedVariables)
        return getattr(problem, level).expand(params) if nested else params

    def result(self) -> Result:
        """What there is so far."""
        return Result(
            self.x,
            self.y,
            tuple(self._history),
            tuple(self._evaluations),
            self._held,
            tuple(self._warned),
            dict(self._figures),
            self._reason,
            self._best,
            self.setup,
        )


def iterate(
    problem: Problem | Named,
    *,
    lower: LowerSolver | Named = "gradient",
    upper: Upper | Optimizer | Named | None = None,
    estimator: Estimator | Named = "implicit",
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    autocast: Literal["bfloat16"] | None = None,
    compile: Literal["off", "step", "inductor"] = "off",
    evaluate_every: int = 0,
    evaluate_held: bool = False,
    stop: EarlyStop | Mapping[str, Any] | None = None,
    best: Best | Mapping[str, Any] | None = None,
) -> Iteration:
    """The run that `minimize` drives, as an iterator of its events (`bilevel.events`).

    Nothing is computed before the first event is asked for. Between two events the run is still:
    `.x`, `.y` and `.result()` are those of the last whole step, also after an exception.

    Args and Raises: as of `minimize`.
    """
    given: dict[str, Any] = {
        "seed": _integer(seed),
        "device": _device(device),
        "dtype": str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype,
        "autocast": autocast,
        "compile": compile,
        "evaluate_every": _integer(evaluate_every),
        "evaluate_held": evaluate_held,
    }
    require(**given, **({} if steps is None else {"steps": _integer(steps)}))
    name = problem["name"] if isinstance(problem, Mapping) and "name" in problem else problem
    return Iteration(
        Setup(  # which takes components by name
            cast("Problem", problem),
            cast("LowerSolver", lower),
            _upper(upper, steps),
            cast("Estimator", estimator),
            name=name if isinstance(name, str) else type(problem).__name__,
            seed=given["seed"],
            device=placement.device(given["device"], "device"),
            dtype=placement.DTYPES[given["dtype"]],
            autocast=placement.DTYPES[autocast] if autocast else None,
            compile=compile,
            evaluate_every=given["evaluate_every"],
            evaluate_held=evaluate_held,
            stop=None if stop is None else made(EarlyStop, stop, "stop"),
            best=None if best is None else made(Best, best, "best"),
        )
    )


def minimize(
    problem: Problem | Named,
    *,
    lower: LowerSolver | Named = "gradient",
    upper: Upper | Optimizer | Named | None = None,
    estimator: Estimator | Named = "implicit",
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    autocast: Literal["bfloat16"] | None = None,
    compile: Literal["off", "step", "inductor"] = "off",
    evaluate_every: int = 0,
    evaluate_held: bool = False,
    stop: EarlyStop | Mapping[str, Any] | None = None,
    best: Best | Mapping[str, Any] | None = None,
    progress: bool | Literal["auto"] = "auto",
) -> Result:
    """Take upper steps along the hypergradient of Φ(x) = F(x, y*(x)), and return where they led.

    The numbers are those of `bilevel run` with the same recipe. Nothing is written to disk.

    Args:
        problem: any `bilevel.problem.Problem`; its x and y may be nested (dicts, lists, tuples,
            dataclasses of tensors) and come back so. This and the components below may also be given by
            name, or as a mapping of `name` and options, as in a recipe.
        lower: the lower solver; 20 steps of SGD by default.
        upper: an optimizer of x, Adam with lr 0.01 by default; or an `Upper`, or a mapping of its
            options, as in a recipe: schedule, clip, accumulate, nonfinite.
        estimator: of the hypergradient; `Implicit` with CG by default.
        steps: upper steps; 100 by default, or those of an `Upper`.
        seed: of every random stream.
        device: "auto" is the first CUDA device if there is one, else the CPU.
        dtype: of x, y and the batches.
        autocast: "bfloat16" takes the products in both losses in it (`torch.autocast`); x, y and all
            sums stay in float32.
        compile: "step" records an upper step once and replays it without the Python around its
            operations, to the same bits; a warning says why where it cannot. "inductor" compiles what
            was recorded besides, to the same numbers but for rounding.
        evaluate_every: also take the problem's own measures every so many steps.
        evaluate_held: take them at the end also with x as it began and y trained as long
            (`Result.held`): only what is above that is owed to x. `bilevel run` does unless its
            recipe says otherwise. Costs the lower solves of the run again.
        stop: a measure, looked at every `evaluate_every` steps, that ends the run where it gains
            nothing: an `EarlyStop` or a mapping of its options.
        best: a measure at whose best x and y are kept (`Result.best`): a `Best` or a mapping.
        progress: show it on stderr; "auto" does in a terminal and in a notebook.

    Warnings of the run are Python warnings (`UserWarning`), once a kind. Ctrl-C (a notebook's
    "interrupt") returns the steps that were taken, with a warning and `reason` "interrupted"; its
    measures are those that were last taken (`Result.measured_at`). Before the first step is whole it is
    raised. To keep the steps before an error, drive
    `iterate` yourself.

    Raises:
        RecipeError: an unknown name or option, or an argument of the wrong kind.
        RequirementError: a device or a package is missing.
        ProblemError: parts that cannot work together, a loss that cannot be differentiated, or with
            `compile` one that depends on what Python remembers.
        ConvergenceError: a loss, x or y is not finite any more.
    """
    run = iterate(
        problem,
        lower=lower,
        upper=upper,
        estimator=estimator,
        steps=steps,
        seed=seed,
        device=device,
        dtype=dtype,
        autocast=autocast,
        compile=compile,
        evaluate_every=evaluate_every,
        evaluate_held=evaluate_held,
        stop=stop,
        best=best,
    )
    receiver = shown(progress)
    try:
        for event in run:
            if receiver:
                receiver.receive(event)
            if isinstance(event, Warned):
                warnings.warn(f"step {event.step}: {event.message}", UserWarning, stacklevel=2)
    except KeyboardInterrupt:
        result = run.result()
        if not result.history:
            raise
        if run.state:
            run.state.settle()
        taken = f"{result.history[-1].step} of {run.setup.upper.steps}"
        at = result.measured_at
        is_older = at is not None and at != result.history[-1].step
        measured = f"; the measures are those of step {at}" if is_older else ""
        warnings.warn(f"interrupted after {taken} steps{measured}", UserWarning, stacklevel=2)
        return replace(result, reason="interrupted")
    finally:
        if receiver:
            receiver.close()
    return run.result()


def _upper(given: Any, steps: int | None) -> Upper:
    if given is None:
        upper = Upper()
    elif isinstance(given, Upper) or (isinstance(given, Mapping) and "name" not in given):
        upper = made(Upper, given, "upper")
    else:
        upper = Upper(optimizer=resolve("optimizers", given, "upper"))
    return upper if steps is None else replace(upper, steps=_integer(steps))


def _integer(given: Any) -> Any:
    """Also an integer of numpy, as an array of seeds has them."""
    return int(given) if isinstance(given, Integral) and type(given) is not bool else given


def _device(given: Any) -> Any:
    """What a recipe calls the device; of those without a number in a recipe there is one."""
    if not isinstance(given, torch.device):
        return given
    return str(given) if given.type == "cuda" else given.type
