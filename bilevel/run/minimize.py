"""A run without a recipe and without a file: `minimize` drives it, `iterate` lets you drive it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch

from bilevel import tree
from bilevel.errors import RecipeError
from bilevel.events import Drawn, Evaluated, Event, Finished, Held, Stepped, Warned
from bilevel.problem.nested_variables import NestedVariables
from bilevel.problem.protocol import Problem
from bilevel.registry.build import made, resolve
from bilevel.run import engine, placement
from bilevel.run.setup import Setup, State
from bilevel.run.targets import Best, EarlyStop
from bilevel.run.upper import Upper
from bilevel.sinks.progress import progress as shown
from bilevel.types import Estimator, LowerSolver, Named, Optimizer


@dataclass(frozen=True)
class Result:
    """Where a run ended and how it came there."""

    x: Any
    """In the containers of the problem's own: a dict of tensors, or nested."""
    y: Any
    history: tuple[Stepped, ...]
    """One event an upper step: losses before the step, ‖dΦ/dx‖, evidence and oracle calls."""
    evaluations: tuple[Evaluated, ...]
    """The problem's own measures, before, in between where asked for, and after."""
    held: Mapping[str, float]
    """Them with x as it began and y trained as long; empty unless `evaluate_held`."""
    warned: tuple[Warned, ...]
    figures: Mapping[str, Any]
    reason: str
    """"done", "stopped early" or "interrupted"."""
    best: BestPoint | None
    """Where the measure that `best` names was best; None unless it was asked for."""
    setup: Setup = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The problem's own measures when they were last taken; empty where it has none."""
        return self.evaluations[-1].metrics if self.evaluations else {}

    def columns(self) -> dict[str, list[float]]:
        """The history as lists of one length: what `pandas.DataFrame` and `plt.plot` take."""
        return {
            "step": [event.step for event in self.history],
            "upper_loss": [event.upper_loss for event in self.history],
            "lower_loss": [event.lower_loss for event in self.history],
            "hypergradient_norm": [event.hypergradient_norm for event in self.history],
            "gradients": [event.totals.gradients for event in self.history],
            "hvps": [event.totals.hvps for event in self.history],
            "cross_products": [event.totals.cross_products for event in self.history],
            "seconds": [event.seconds for event in self.history],
        }

    def __repr__(self) -> str:
        if not self.history:
            return f"<{self.reason}: no step>"
        first, last = self.history[0], self.history[-1]
        totals = last.totals
        parts = [
            f"{self.reason} after {last.step} of {self.setup.upper.steps} steps",
            f"F {first.upper_loss:.4g} → {last.upper_loss:.4g}",
            f"‖dΦ/dx‖ {first.hypergradient_norm:.2g} → {last.hypergradient_norm:.2g}",
            f"{totals.gradients} gradients, {totals.hvps} HVPs, {totals.cross_products} cross",
        ]
        parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        parts += [f"warned of {', '.join(w.kind for w in self.warned)}"] if self.warned else []
        return f"<{'; '.join(parts)}>"


@dataclass(frozen=True)
class BestPoint:
    """The state of a run at which a measure was best."""

    step: int
    metrics: Mapping[str, float]
    x: Any
    y: Any


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
    name = problem["name"] if isinstance(problem, Mapping) and "name" in problem else problem
    return Iteration(
        Setup(  # which takes components by name
            cast("Problem", problem),
            cast("LowerSolver", lower),
            _upper(upper, steps),
            cast("Estimator", estimator),
            name=name if isinstance(name, str) else type(problem).__name__,
            seed=seed,
            device=placement.device(device, "device") if isinstance(device, str) else device,
            dtype=placement.dtype(dtype) if isinstance(dtype, str) else dtype,
            autocast=placement.autocast(autocast),
            evaluate_every=evaluate_every,
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
        evaluate_every: also take the problem's own measures every so many steps.
        evaluate_held: take them at the end also with x as it began and y trained as long
            (`Result.held`): only what is above that is owed to x. `bilevel run` does unless its
            recipe says otherwise. Costs the lower solves of the run again.
        stop: a measure, looked at every `evaluate_every` steps, that ends the run where it gains
            nothing: an `EarlyStop` or a mapping of its options.
        best: a measure at whose best x and y are kept (`Result.best`): a `Best` or a mapping.
        progress: show it on stderr; "auto" does in a terminal and in a notebook.

    Warnings of the run are Python warnings (`UserWarning`), once a kind. Ctrl-C (a notebook's
    "interrupt") returns the steps that were taken, with a warning and `reason` "interrupted";
    before the first step is whole it is raised. To keep the steps before an error, drive
    `iterate` yourself.

    Raises:
        RecipeError: an unknown name or option, or an argument of the wrong kind.
        RequirementError: a device or a package is missing.
        ProblemError: parts that cannot work together, or a loss that cannot be differentiated.
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
        taken = f"{result.history[-1].step} of {run.setup.upper.steps}"
        warnings.warn(f"interrupted after {taken} steps", UserWarning, stacklevel=2)
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
    if steps is None:
        return upper
    if type(steps) is not int or steps < 1:
        raise RecipeError(f"steps = {steps!r}; must be an integer ≥ 1")
    return replace(upper, steps=steps)
