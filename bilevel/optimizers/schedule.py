"""The learning rate of each step, by any scheduler of `torch.optim.lr_scheduler`."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch.optim import lr_scheduler

from bilevel.components import component
from bilevel.errors import ProblemError, unknown
from bilevel.optimizers.learned import Learned
from bilevel.optimizers.torch_optim import TorchOptimizer
from bilevel.types import Optimizer

COMPOSED = ("SequentialLR", "ChainedScheduler")
"""Those that are made of others, given as their option `schedulers`."""
FUNCTIONS = ("LambdaLR", "MultiplicativeLR")
"""Those that take a function, which Python has and a recipe has not."""
UNTOUCHED = 0.123456789
"""A momentum that no schedule sets by chance."""
LIMIT = 32
"""Schedules whose rates are kept."""


@component
class Schedule:
    """`torch.optim.lr_scheduler.<name>(optimizer, **options)`, e.g. name=StepLR, options={step_size: 30}.

    Step k + 1 is taken at the rate that torch's own scheduler has after k steps, for an optimizer
    of the same lr. SequentialLR and ChainedScheduler take `schedulers`, a list of {name, options}:
    a warm-up and what follows it. The momentum is not scheduled: OneCycleLR and CyclicLR need
    `cycle_momentum: false`. ReduceLROnPlateau is refused, since it follows a measure: a rate is a
    function of the step alone here, so that a resumed run has the same.

    Raises (where a rate is asked for):
        ProblemError: torch has none for that step, or one that is negative or not finite.
    """

    name: str
    """A class of `torch.optim.lr_scheduler`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own, all but `optimizer`."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        try:
            _Rates(self, 0.1).upto(1)
        except ProblemError as error:
            raise ValueError(str(error)) from error
        return self

    def rates(self, begin: int, end: int, lr: float) -> list[float]:
        """The rates of steps begin + 1, …, end, for an optimizer whose lr is `lr`."""
        key = repr(self), lr
        known = _known.get(key)
        if known is None or known.schedule != self:  # addresses of functions are used again
            known = _known[key] = _Rates(self, lr)
            while len(_known) > LIMIT:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return known.upto(end)[begin:end]


class _Rates:
    """The rates that torch's scheduler gives, as many as were asked for: most follow from the one before."""

    def __init__(self, schedule: Schedule, lr: float) -> None:
        self.schedule = schedule
        self._optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr, UNTOUCHED)
        self._scheduler = _scheduler(schedule.name, schedule.options, self._optimizer)
        self._found = [self._rate(0)]

    def upto(self, count: int) -> list[float]:
        while len(self._found) < count:
            k = len(self._found)
            self._optimizer.step()  # without gradients: nothing but what torch asks for
            try:
                self._scheduler.step()
            except Exception as error:
                raise ProblemError(
                    f"schedule {self.schedule.name} has no rate for step {k + 1}: {error}"
                ) from error
            self._found.append(self._rate(k))
        return self._found

    def _rate(self, k: int) -> float:
        (group,) = self._optimizer.param_groups
        rate, name = float(group["lr"]), self.schedule.name
        if group["momentum"] != UNTOUCHED:
            raise ProblemError(
                f"{name} would schedule the momentum too, which stays as the optimizer has it; "
                "give it cycle_momentum: false"
            )
        if not (math.isfinite(rate) and rate >= 0):
            raise ProblemError(f"schedule {name} has lr = {rate} for step {k + 1}; must be ≥ 0")
        return rate


_known: OrderedDict[tuple[str, float], _Rates] = OrderedDict()


def _scheduler(name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    cls = _class(name)
    if name in COMPOSED:
        options = {**options, "schedulers": _parts(name, options, optimizer)}
    if name in FUNCTIONS and not callable(options.get("lr_lambda")):
        raise ValueError(f"{name} takes a function lr_lambda, which only Python can give it")
    try:
        if name == "ChainedScheduler":
            return cls(options.pop("schedulers"), optimizer, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return cls(optimizer, **options)
    except Exception as error:  # of any kind: torch checks some options by using them
        raise ValueError(f"torch.optim.lr_scheduler.{name}: {error}") from error


def _class(name: str) -> Any:
    base = lr_scheduler.LRScheduler
    known = {
        known: cls
        for known, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, base) and known[0] != "_"
    }
    if name == "ReduceLROnPlateau":
        raise ValueError(
            "ReduceLROnPlateau follows a measure, and a rate is a function of the step alone here; "
            "take another schedule, and evaluate.stop to end when a measure rests"
        )
    offered = sorted({*known} - {"LRScheduler", "ReduceLROnPlateau"})
    if name not in offered:
        raise ValueError(unknown(name, offered, "scheduler of torch"))
    return known[name]


def _parts(name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[Any]:
    given = options.get("schedulers")
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{name} needs schedulers, a list of {{name, options}}")
    made = []
    for part in given:
        is_named = isinstance(part, Mapping) and {"name"} <= part.keys() <= {"name", "options"}
        if not is_named:
            raise ValueError(f"{name}: schedulers are {{name, options}} each; got {part!r}")
        made.append(_scheduler(part["name"], part.get("options") or {}, optimizer))
    return made


def lr_of(optimizer: Optimizer) -> float | Learned:
    """The learning rate of an optimizer.

    Raises:
        ProblemError: it has none, so that no schedule could be followed.
    """
    lr = (
        optimizer.lr_of_torch
        if isinstance(optimizer, TorchOptimizer)
        else vars(optimizer).get("lr")
    )
    if isinstance(lr, Learned):
        return lr
    if isinstance(lr, (int, float)):
        return float(lr)
    raise ProblemError(
        f"{type(optimizer).__name__} has no number `lr`, so it cannot follow a schedule; use sgd, adam, "
        "adamw, rmsprop or torch, or leave schedule out"
    )


def with_lr(optimizer: Optimizer, lr: Any) -> Optimizer:
    """The same optimizer at another learning rate, not validated: 0 is the end of many schedules."""
    made = copy.copy(optimizer)
    if isinstance(optimizer, TorchOptimizer):
        object.__setattr__(made, "options", {**optimizer.options, "lr": float(lr)})
    else:
        object.__setattr__(made, "lr", lr)
    return made
