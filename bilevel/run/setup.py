"""What a run is made of (`Setup`) and where it is (`State`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from bilevel import tree
from bilevel.errors import BilevelError, CheckpointError, ProblemError, RecipeError
from bilevel.events import Stepped, Totals
from bilevel.problem.answers import initial, said
from bilevel.problem.autocast import NEEDS_FLOAT32, under_autocast
from bilevel.problem.levels import Levels
from bilevel.problem.nested_variables import NestedVariables
from bilevel.problem.protocol import Problem
from bilevel.problem.sharded import sharded
from bilevel.problem.states import require_state
from bilevel.problem.tied import Ties
from bilevel.ranks import ALONE, Ranks
from bilevel.registry.build import resolve
from bilevel.rng import Seeded, Streams
from bilevel.run.batches import Draws, Sampler, paired
from bilevel.run.options import require
from bilevel.run.targets import Best, EarlyStop
from bilevel.run.upper import Upper
from bilevel.sharding.parts import X_FROM
from bilevel.sharding.states import parted, wholes
from bilevel.types import Estimator, LowerSolver, Params


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of; assembled from a recipe, or by hand."""

    problem: Problem
    lower: LowerSolver
    upper: Upper
    estimator: Estimator
    name: str = "run"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    """In what the losses are evaluated below float32 (`bilevel.problem.autocast`)."""
    compile: Literal["off", "step", "inductor"] = "off"
    """Whether the upper step is recorded once and replayed (`bilevel.run.replayed`)."""
    evaluate_before: bool = True
    """Whether to evaluate before the first step."""
    evaluate_every: int = 0
    """Upper steps between evaluations; 0 evaluates before and after only."""
    evaluate_held: bool = False
    """Whether to evaluate at the end x as it began, with y trained as long (`bilevel.run.held`)."""
    draw: bool = True
    """Whether the problem draws its figures at the end."""
    stop: EarlyStop | None = None
    """When to end before all steps are taken."""
    best: Best | None = None
    """Which measure says that a state is the best so far."""
    ranks: Ranks = ALONE
    """Who computes it together; their `problem` is spread over them."""

    def __post_init__(self) -> None:
        """Components may be given by name; a class in place of an instance is refused."""
        for name, group in (
            ("problem", "problems"),
            ("lower", "lower"),
            ("estimator", "estimators"),
        ):
            object.__setattr__(self, name, resolve(group, getattr(self, name), name))
        options = ("seed", "compile", "evaluate_every", "evaluate_held")
        require(**{name: getattr(self, name) for name in options})
        if self.autocast is not None and self.dtype != torch.float32:
            raise RecipeError(NEEDS_FLOAT32)
        problem = under_autocast(self.problem, self.device, self.autocast)
        object.__setattr__(self, "problem", problem)
        if self.stop is not None and not self.evaluate_every:
            raise RecipeError(
                "stop looks at the measures of every so many steps; set evaluate_every"
            )

    def flatten(self, x: Any, y: Any) -> None:
        """Put the problem in flat dicts in the place of one whose variables are nested as x and y."""
        object.__setattr__(self, "problem", NestedVariables(self.problem, x, y))
        vars(self).pop("levels", None)

    def shard(self, x: Params, y: Params) -> tuple[Params, Params]:
        """x and y as this rank holds them, where ranks hold parameters together; else as they are."""
        team = self.ranks.team
        if team is None:
            return x, y
        object.__setattr__(self, "problem", sharded(self.problem, team))
        vars(self).pop("levels", None)
        # a name says how an entry is held, whichever of the two it is of
        with_x = tree.size(x) >= X_FROM or not x.keys().isdisjoint(y)
        team.levels = {"x", "y"} if with_x else {"y"}
        return team.cut(x) if with_x else x, team.cut(y)

    def seeded(self, method: str) -> Seeded:
        """Within it a method of the problem may draw from the global random states: they are of the seed."""
        return Seeded(self.seed, f"{method}.global", self.device)

    @cached_property
    def levels(self) -> Levels:
        """What the problem offers, found once."""
        return Levels(self.problem)


def nothing_to_settle() -> None:
    """Where no step was replayed."""


@dataclass
class State:
    """Where a run is. All that the next step depends on is here."""

    step: int
    x: Params
    y: Params
    lower: Any
    upper: Any
    estimator: Any
    """None before the first estimate."""
    upper_batches: Draws
    lower_batches: Draws
    totals: Totals = field(default_factory=Totals)
    warned: dict[str, int] = field(default_factory=dict)
    """At how many steps each kind of warning held; 0 for what was said before the first."""
    evaluated: int | None = None
    """The step at which the problem's own measures were taken last."""
    recovery: dict[str, Any] = field(default_factory=dict)
    """What `upper.nonfinite` goes back to, or counts (`bilevel.run.nonfinite`)."""
    scale: dict[str, Any] = field(default_factory=dict)
    """How large losses and ‖∇y G‖ were in the first steps, and of how many (`run.divergence`)."""
    watched: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The best of each measure that is watched, when, and how often not since (`run.early_stop`)."""

    began: dict[str, Params] = field(default_factory=dict)
    """Some of each entry of x and y before the first step (`run.unmoved`)."""
    last: Stepped | None = None
    """What was said of the last step that was taken here."""
    settle: Callable[[], None] = nothing_to_settle
    """Compares what was replayed since the last comparison with the steps themselves (`run.replayed`)."""

    def rewind(self) -> None:
        """Where a step has failed: have `save` describe the state before it, with batches to draw again."""
        self.upper_batches.rewind()
        self.lower_batches.rewind()

    def save(self) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings, from which `restore` rebuilds the state.

        Where ranks hold it together it is made whole, one tensor at a time: all of them have to call
        this, and the first alone has the whole on its CPU; others have None for what is in parts.

        Raises:
            ProblemError: a step that was replayed (`runtime.compile`) is another than by itself.
        """
        self.settle()
        return wholes(self._described(), self.y)

    def _described(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "x": self.x,
            "y": self.y,
            "lower": self.lower,
            "upper": self.upper,
            "estimator": self.estimator,
            "upper_batches": self.upper_batches.save(),
            "lower_batches": self.lower_batches.save(),
            "totals": asdict(self.totals),
            "warned": dict(self.warned),
            "evaluated": self.evaluated,
            "recovery": self.recovery,
            "scale": dict(self.scale),
            "watched": {name: dict(seen) for name, seen in self.watched.items()},
        }


def start(setup: Setup) -> State:
    """The state before the first step.

    Where the problem's x or y is nested, `setup.problem` is from now on the same problem of flat
    dicts (`NestedVariables`).
    """
    x, y = initial(setup.problem, Streams(setup.seed), setup.device)
    if tree.flat(x, "x") is not x or tree.flat(y, "y") is not y:
        setup.flatten(x, y)
        x, y = tree.flat(x, "x"), tree.flat(y, "y")
    for params, name in ((x, "x"), (y, "y")):
        if not Ties(params).trivial:
            raise ProblemError(f"{name} holds one tensor under two names; give it one name")
    if not y:
        raise ProblemError("y is empty: a bilevel problem has lower variables")
    x, y = (
        tree.contiguous(tree.clone(tree.to(params, setup.device, setup.dtype))) for params in (x, y)
    )
    x, y = setup.shard(x, y)
    began = {"x": glimpsed(x), "y": glimpsed(y)}
    upper_batches, lower_batches = _draws(setup)
    return State(
        step=0,
        x=x,
        y=y,
        lower=setup.lower.init(y),
        upper=setup.upper.optimizer.init(x),
        estimator=None,
        upper_batches=upper_batches,
        lower_batches=lower_batches,
        began=began,
    )


def glimpsed(params: Params, most: int = 4096) -> Params:
    """Copies of up to `most` numbers of each entry, evenly spread."""
    flat = {name: entry.detach().reshape(-1) for name, entry in params.items()}
    return {name: entry[:: -(-len(entry) // most) or 1].clone() for name, entry in flat.items()}


def _draws(setup: Setup) -> tuple[Draws, Draws]:
    """Where the (upper, lower) batches come from: one by one, or in pairs that belong together."""

    def sampler(make: Any, name: str) -> Sampler:
        return Sampler(make, setup.seed, name, setup.device, setup.dtype)

    episodes = setup.levels.get("episodes")
    if episodes is not None:
        return paired(sampler(episodes, "episodes"), said(setup.problem, "episodes"))
    return (
        sampler(setup.problem.upper_batches, "upper.batches"),
        sampler(setup.problem.lower_batches, "lower.batches"),
    )


def restore(setup: Setup, saved: dict[str, Any]) -> State:
    """The state that `State.save` described, on the setup's device.

    Raises `CheckpointError` where `saved` is not such a description, `ProblemError` where it is one of
    another problem.
    """
    _require_saved(saved, setup.upper.steps)
    state = start(setup)
    for level in ("x", "y"):
        params = getattr(state, level)
        got, expected = tree.shapes(saved[level]), tree.shapes(params)
        if got != expected:
            raise ProblemError(
                f"the saved state is of another problem: {level} is {got} in it, expected {expected}"
            )
    saved = parted(saved, state.x, state.y)
    for level, params in (("upper", state.x), ("lower", state.y)):
        require_state(saved[level], params, "the saved optimizer")
    for name in ("x", "y", "lower", "upper", "estimator"):
        setattr(state, name, _on(saved[name], setup.device))
    try:
        state.upper_batches.restore(saved["upper_batches"])
        state.lower_batches.restore(saved["lower_batches"])
    except BilevelError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        kind = type(error).__name__
        raise CheckpointError(f"batches cannot go on where they were: {kind}: {error}") from error
    state.step, state.warned = saved["step"], dict(saved["warned"])
    state.totals = Totals(**saved["totals"])
    state.evaluated = saved.get("evaluated", state.step)
    state.recovery = _on(saved.get("recovery", {}), setup.device)
    state.scale = dict(saved.get("scale", {}))
    state.watched = {name: dict(seen) for name, seen in saved.get("watched", {}).items()}
    return state


_DRAWS: Mapping[str, Any] = {"drawn": int, "stream": torch.Tensor}
_SAVED: Mapping[str, Any] = {
    "step": int,
    "x": dict,
    "y": dict,
    "lower": object,
    "upper": object,
    "estimator": object,
    "upper_batches": _DRAWS,
    "lower_batches": _DRAWS,
    "totals": dict.fromkeys(asdict(Totals()), int),
    "warned": dict,
}


def _require_saved(saved: Any, steps: int) -> None:
    """Whether all is there, of its kind; counts are not negative and the step is one of the run's."""

    def require(value: Any, kind: Any, where: str) -> None:
        if isinstance(kind, Mapping):
            require(value, dict, where)
            for key in kind:
                if key not in value:
                    raise CheckpointError(f"the saved state has no {where}{key}: it was altered")
                require(value[key], kind[key], f"{where}{key}.")
        elif not isinstance(value, kind) or (
            kind is int and (isinstance(value, bool) or not 0 <= value < 2**63)
        ):
            raise CheckpointError(
                f"the saved state holds {str(value)[:40]!r} as {where.rstrip('.')}: it was altered"
            )

    require(saved, _SAVED, "")
    for level in ("x", "y"):
        require(saved[level], dict.fromkeys(saved[level], torch.Tensor), f"{level}.")
    # not of a state that is older than they are
    require(saved.get("recovery", {}), dict, "recovery.")
    for key, value in saved.get("recovery", {}).items():
        kinds = {"row": int, "x": dict.fromkeys(saved["x"], torch.Tensor)}
        require(value, kinds.get(key, int), f"recovery.{key}.")
    if saved.get("scale"):
        require(saved["scale"], {"steps": int, "loss": float, "norm": float}, "scale.")
    require(saved.get("watched", {}), dict, "watched.")
    for name, seen in saved.get("watched", {}).items():
        require(seen, {"value": float, "step": int, "waited": int}, f"watched.{name}.")
    require(saved["warned"], dict.fromkeys(saved["warned"], int), "warned.")
    if saved["step"] > steps:
        raise CheckpointError(
            f"the saved state is that of step {saved['step']}, and the run has {steps} steps"
        )


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value
