"""The two levels of a problem: what it offers, found once, and its losses and lower solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.lower.solved import solved
from bilevel.problem.answers import RESTRICTS, answered, require_form, said
from bilevel.problem.protocol import OPTIONAL
from bilevel.problem.states import require_state
from bilevel.types import (
    Counts,
    Iterates,
    Loss,
    Losses,
    LowerSolution,
    LowerSolver,
    LowerStats,
    Params,
    Point,
    Structure,
)
from bilevel.unrolling.path import with_restart

REQUIRED = ("init", "upper_loss", "lower_loss", "upper_batches", "lower_batches")


class Levels:
    """A problem and what it offers.

    Raises:
        ProblemError: it lacks a method that every problem has.
    """

    def __init__(self, problem: Any) -> None:
        missing = [name for name in REQUIRED if not callable(getattr(problem, name, None))]
        if missing:
            raise ProblemError(
                f"{type(problem).__name__} is not a Problem: {lacks(problem, missing)}; see "
                "bilevel.problem.Problem"
            )
        self.problem = problem
        found = ((name, answered(problem, name)) for name in OPTIONAL)
        self.optional: dict[str, Callable[..., Any]] = {n: m for n, m in found if m is not None}
        """The optional methods that it has."""
        self.structure = structure_of(problem)

    def __contains__(self, name: str) -> bool:
        """Whether it has this optional method."""
        return name in self.optional

    def get(self, name: str) -> Callable[..., Any] | None:
        """An optional method, None where the problem has none of that name."""
        assert name in OPTIONAL, name
        return self.optional.get(name)

    def losses(
        self,
        upper_batch: Any = None,
        lower_batch: Any = None,
        draws: tuple[Iterator[Any], Iterator[Any]] | None = None,
    ) -> Losses:
        """F and G on these batches, with one ledger; `draws` are where fresh ones come from."""
        counts, (upper, lower) = Counts(), draws or (None, None)
        return Losses(
            Loss(self.problem.upper_loss, upper_batch, counts, "upper", upper),
            Loss(self.problem.lower_loss, lower_batch, counts, "lower", lower, self.structure),
        )

    def solution(self, x: Params, y: Params) -> Params | None:
        """`lower_solution` at x, in the form of y; None where there is none."""
        closed = self.get("lower_solution")
        if closed is None:
            return None
        found = closed(x)
        require_form(found, y, said(self.problem, "lower_solution"), "y")
        return tree.detach(found)

    def restart(self, y: Params) -> Callable[[Params], Params] | None:
        """`lower_start` as a function of x alone, y held fixed; None where there is none."""
        lower_start = self.get("lower_start")
        return None if lower_start is None else lambda x: lower_start(x, y)

    def solve(
        self,
        solver: LowerSolver,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any = None,
        record: float = 0,
        graph: bool = False,
        iterates: Iterates | None = None,
        restart: bool = True,
    ) -> LowerSolution:
        """The lower solve from y; from `lower_start`, with a new state, where the problem says so.

        `state` None begins with a new state; `restart` False begins at y whatever the problem says;
        `graph` keeps that of the recorded steps, and `iterates` those between them, where the solver can.

        Raises:
            ProblemError: the solver would ignore what restricts y, or cannot record its steps.
        """
        begin = self.restart(y) if restart else None
        if begin:
            y, state = tree.detach(begin(x)), None
        loss = self.losses().lower
        found = solve(solver, loss, x, y, batches, state, record, graph, iterates)
        return with_restart(found, begin)

    def unsolved(
        self, solver: LowerSolver, x: Params, y: Params, *, batches: Iterator[Any], state: Any
    ) -> LowerSolution:
        """Where a method that moves y itself begins: y as it is, or `lower_start`, and a batch."""
        begin = self.restart(y)
        if begin:
            y = tree.detach(begin(x))
            state = solver.init(y)
        return LowerSolution(y, state, LowerStats(0, 0, math.nan, math.nan), next(batches))


def lacks(component: Any, missing: Sequence[str]) -> str:
    """`it lacks init`, and what to write where the batches of a problem with `episodes` are missing."""
    said = f"it lacks {', '.join(missing)}"
    if not hasattr(component, "episodes") or not {"upper_batches", "lower_batches"} & {*missing}:
        return said
    return (
        f"{said}, needed beside episodes, since losses are looked at on such batches before a run: return "
        "(upper for _, upper in self.episodes(stream)), and (lower for lower, _ in self.episodes(stream))"
    )


def structure_of(problem: Any) -> Structure:
    """What a problem says of y* beside the minimum of G."""
    methods = {**RESTRICTS, "constraints": "lower_constraints", "diagonal": "lower_diagonal"}
    return Structure(**{field: answered(problem, name) for field, name in methods.items()})


def solve(
    solver: LowerSolver,
    loss: Loss,
    x: Params,
    y: Params,
    batches: Iterator[Any],
    state: Any = None,
    record: float = 0,
    graph: bool = False,
    iterates: Iterates | None = None,
) -> LowerSolution:
    """The solver's own solve, once it is known to be able to; `state` None begins with a new one.

    Raises:
        ProblemError: it would ignore what restricts y, its steps cannot be recorded, or the state
            is of another problem.
    """
    require_offers(solver, loss.structure, record)
    if state is None:
        state = solver.init(y)
    else:
        require_state(state, y, "the state of the lower solver")
    asked = {"graph": graph or None, "iterates": iterates}
    kept = {name: what for name, what in asked.items() if what and getattr(solver.offers, name)}
    try:
        return solved(solver, loss, x, y, batches=batches, state=state, record=record, **kept)
    except KeyError as error:
        if "trees differ" not in str(error):
            raise  # a loss that looks for a name that is not there
        raise ProblemError(
            f"the state of the lower solver is not one of {type(solver).__name__} for these "
            f"variables: {error.args[0]}; pass state=None where they or the solver have changed"
        ) from error


def require_offers(solver: LowerSolver, structure: Structure, record: float = 0) -> None:
    """Raise `ProblemError` where a lower solver would ignore what restricts y, or keeps no path."""
    name, offers = type(solver).__name__, solver.offers
    if record and not offers.path:
        raise ProblemError(
            f"{solver!r} takes no steps that can be recorded and replayed; use Gradient (lower: "
            "gradient) with optimizer sgd, adam, adamw or rmsprop"
        )
    ignored = offers.ignored(structure.restrictions)
    if ignored:
        remedy = {
            "project_lower": "gradient, which projects after each step",
            "prox_lower": "proximal",
            "lower_constraints": "augmented_lagrangian, or add project_lower",
        }[ignored]
        raise ProblemError(
            f"the lower level has {ignored}, and {name} would ignore it: y would not be where "
            f"that restricts it to; use lower: {remedy}"
        )


def point_of(x: Params, solution: LowerSolution) -> Point:
    """Where a lower solve has led to, with what it kept on the way."""
    return Point(x, solution.y, solution.path, solution.pairs)
