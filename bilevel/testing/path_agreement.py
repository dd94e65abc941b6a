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
from bilevel.calculus.finite_differences import Differences, central
from bilevel.errors import BilevelError, ProblemError
from bilevel.events import Event, Progress
from bilevel.problem.estimation import estimate
from bilevel.problem.levels import point_of
from bilevel.run.engine import Setup, prepare, start
from bilevel.run.refusals import refuse_empty_upper
from bilevel.types import ALL_STEPS, Estimator, Params
from bilevel.unrolling.path import along

COORDINATES = 16
"""A variable of at most so many entries is looked at in each; a larger one along random directions."""
DIRECTIONS = 8
ROUGH = 1e-2
"""Differences with a larger error say little of an estimator that is close to them."""


@dataclass(frozen=True)
class Agreement:
    """One upper variable: cosine, and ‖h‖ / ‖d‖, of the slopes h and the differences d."""

    cosine: float
    ratio: float
    error: float = 0.0
    """Of d, relative, as `calculus.finite_differences.Differences` estimates it. Large where F rounds more
    coarsely than float64, as a layer does that computes in float32 whatever it is given."""

    @property
    def is_rough(self) -> bool:
        """Whether d itself is off by so much that neither number is to be taken for the estimator's."""
        return self.error > ROUGH


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
    seen nothing before its first step, which is therefore like no other. Of each variable in every
    coordinate, or along 8 orthonormal directions where it has more than 16, by
    `calculus.finite_differences.central` with `step`; float64. Compared with ⟨h, v_i⟩.

    Costs 4 (K gradients + 1 value) a direction, and one estimate each.

    Raises:
        ProblemError: the lower solver's steps cannot be taken again, or x is empty.
    """
    setup = replace(setup, dtype=torch.float64, autocast=None)
    yield from prepare(setup)
    if not setup.lower.offers.path:
        raise ProblemError(
            f"lower: {type(setup.lower).__name__} keeps no path, so its steps cannot be taken again "
            "at another x; use lower: gradient"
        )
    state, levels = start(setup), setup.levels
    refuse_empty_upper(state.x)
    y, inner = state.y, state.lower
    for _ in range(after):
        solved = levels.solve(setup.lower, state.x, y, batches=state.lower_batches, state=inner)
        y, inner = solved.y, solved.state
    solved = levels.solve(
        setup.lower, state.x, y, batches=state.lower_batches, state=inner, record=ALL_STEPS
    )
    at, losses = point_of(state.x, solved), levels.losses(next(state.upper_batches), solved.batch)
    assert at.path is not None
    value, stream = along(at.path, losses), rng.stream(setup.seed, "path directions")
    differences: dict[str, Differences] = {}
    for name, entry in at.x.items():
        yield Progress("differences of the path", len(differences), len(at.x), name)
        differences[name] = central(
            lambda one: value({**at.x, **one}),
            {name: entry},
            stream,
            step=step,
            full=COORDINATES,
            num_directions=DIRECTIONS,
        )
    yield Progress("differences of the path", len(at.x), len(at.x))
    for name, estimator in estimators.items():
        try:
            found = estimate(estimator, losses, at, None).hypergradient
        except BilevelError as error:
            yield PathRow(name, {}, None, str(error))
            continue
        yield _row(name, found, differences)


def _row(name: str, h: Params, differences: Mapping[str, Differences]) -> PathRow:
    pairs = {
        entry: (found.along({entry: h[entry]}), found.slopes)
        for entry, found in differences.items()
    }
    each = {entry: agreement(*pair, differences[entry].error) for entry, pair in pairs.items()}
    h_all, d_all = (torch.cat(side) for side in zip(*pairs.values(), strict=True))
    off = sum((found.error * float(found.slopes.norm())) ** 2 for found in differences.values())
    size = float(d_all.norm())
    return PathRow(name, each, agreement(h_all, d_all, off**0.5 / size if size else 0.0))


def agreement(h: Tensor, d: Tensor, error: float = 0.0) -> Agreement:
    """Cosine and ratio of lengths; where one of them is 0 the cosine is 0, where both are 1."""
    long, true = tree.norm({"h": h}), tree.norm({"d": d})
    if long == 0 or true == 0:
        alike = float(long == true)
        return Agreement(alike, alike if long == 0 else float("inf"), error)
    return Agreement(float(h @ d) / (long * true), long / true, error)
