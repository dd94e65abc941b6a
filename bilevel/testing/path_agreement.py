"""Does a hypergradient point where the run goes? Estimators against the path that is really run.

A run does not solve its lower level: it takes K steps of it from where it stands, on batches that
are drawn. What x does to F is then what it does through these steps, and central differences of
x ↦ F(x, y_K(x)) say it, whatever an estimator claims to differentiate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.errors import BilevelError, ProblemError
from bilevel.events import Event, Progress
from bilevel.problem.estimation import estimate
from bilevel.problem.levels import point_of
from bilevel.run.engine import Setup, prepare, start
from bilevel.types import ALL_STEPS, Estimator, Params
from bilevel.unrolling.path import along

COORDINATES = 16
"""A variable of at most so many entries is looked at in each; a larger one along random directions."""
DIRECTIONS = 8


@dataclass(frozen=True)
class Agreement:
    """One upper variable: cosine, and ‖h‖ / ‖d‖, of the slopes h and the differences d."""

    cosine: float
    ratio: float


@dataclass(frozen=True)
class PathRow:
    """How an estimator agrees with the path."""

    name: str
    agreements: Mapping[str, Agreement]
    """By upper variable."""
    whole: Agreement | None
    """Over the slopes of all variables together."""
    note: str = ""


def path_agreement(
    setup: Setup, estimators: Mapping[str, Estimator], *, after: int = 3, step: float = 1e-4
) -> Iterator[Event | PathRow]:
    """Compare each estimator with central differences of the lower path that the setup runs.

    Differences are taken of φ(x) = F(x, y_K(x)), y_K by the setup's own K lower steps on the
    batches that a run draws, after `after` lower solves at the first x: an adaptive optimizer has
    seen nothing before its first step, which is therefore like no other. For a variable of n
    entries, min(n, 16) coordinates or else 8 random directions of unit length, each
    d_i = (φ(x + ε v_i) − φ(x − ε v_i)) / 2ε, with ε = `step`; float64. Compared with ⟨h, v_i⟩.

    Costs 2 (K gradients + 1 value) a direction, and one estimate each.

    Raises:
        ProblemError: the lower solver's steps cannot be taken again, or x is empty.
    """
    setup = replace(setup, dtype=torch.float64)
    yield from prepare(setup)
    if not setup.lower.offers.path:
        raise ProblemError(
            f"lower: {type(setup.lower).__name__} keeps no path, so its steps cannot be taken again "
            "at another x; use lower: gradient"
        )
    state, levels = start(setup), setup.levels
    if not state.x:
        raise ProblemError("x is empty: with one level only there is no hypergradient to check")
    y, inner = state.y, state.lower
    for _ in range(after):
        solved = levels.solve(setup.lower, state.x, y, batches=state.lower_batches, state=inner)
        y, inner = solved.y, solved.state
    solved = levels.solve(
        setup.lower, state.x, y, batches=state.lower_batches, state=inner, record=ALL_STEPS
    )
    at, losses = point_of(state.x, solved), levels.losses(next(state.upper_batches), solved.batch)
    assert at.path is not None
    value, directions = along(at.path, losses), _directions(state.x, setup.seed)
    total = sum(map(len, directions.values()))
    differences: dict[str, Tensor] = {}
    for name, along_these in directions.items():
        slopes = []
        for v in along_these:
            yield Progress("differences of the path", sum(map(len, differences.values())), total)
            ends = [
                float(value({**at.x, name: at.x[name] + sign * step * v}).detach())
                for sign in (1, -1)
            ]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        differences[name] = torch.tensor(slopes, dtype=torch.float64)
    yield Progress("differences of the path", total, total)
    for name, estimator in estimators.items():
        try:
            found = estimate(estimator, losses, at, None).hypergradient
        except BilevelError as error:
            yield PathRow(name, {}, None, str(error))
            continue
        yield _row(name, _slopes(found, directions), differences)


def _directions(x: Params, seed: int) -> dict[str, list[Tensor]]:
    """Of unit length, in the shape of each variable."""
    stream, found = rng.stream(seed, "path directions"), {}
    for name, value in x.items():
        if value.numel() <= COORDINATES:
            rows = torch.eye(value.numel())
        else:
            rows = torch.randn(DIRECTIONS, value.numel(), generator=stream)
            rows = rows / rows.norm(dim=1, keepdim=True)
        found[name] = [row.reshape(value.shape).to(value) for row in rows]
    return found


def _slopes(h: Params, directions: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([(h[name] * v).sum() for v in rows]).double().cpu()
        for name, rows in directions.items()
    }


def _row(name: str, slopes: Mapping[str, Tensor], differences: Mapping[str, Tensor]) -> PathRow:
    return PathRow(
        name,
        {entry: agreement(slopes[entry], differences[entry]) for entry in differences},
        agreement(torch.cat(list(slopes.values())), torch.cat(list(differences.values()))),
    )


def agreement(h: Tensor, d: Tensor) -> Agreement:
    """Cosine and ratio of lengths; where one of them is 0 the cosine is 0, where both are 1."""
    long, true = tree.norm({"h": h}), tree.norm({"d": d})
    if long == 0 or true == 0:
        alike = float(long == true)
        return Agreement(alike, alike if long == 0 else float("inf"))
    return Agreement(float(h @ d) / (long * true), long / true)
