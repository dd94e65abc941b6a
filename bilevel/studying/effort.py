"""How many runs of a sweep does one run of another arm replace? From the development cells of both, and nothing else.

Of the N settings that were tried of an arm someone might have tried n, any n of them alike; what the best of
these comes to on average is the mean over all choices (Dodge et al., 2019, arXiv:1909.03004, without repetition: Tang et
al., 2020, arXiv:2004.13705). A sweep reaches a level with the fewest n that do so on average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bilevel.studying.costs import Cost, a_run
from bilevel.studying.headroom import behind
from bilevel.studying.plan import StudyPlan
from bilevel.studying.results import StudyCell


@dataclass(frozen=True)
class Effort:
    """An arm's settings on development seeds; one that failed on a seed is left out."""

    arm: str
    best: tuple[float, ...]
    """The expected best of 1, 2, … settings, each by its mean over seeds."""
    by_seed: tuple[tuple[float, ...], ...]
    """The same on each seed by itself."""
    cost: Cost
    """Of one run with the stages before it, the mean over settings and seeds."""


@dataclass(frozen=True)
class Level:
    """What one run comes to, and how many runs of the sweep reach it."""

    is_chosen: bool
    """With the best of its settings; otherwise with any of them, on average."""
    value: float
    runs: int | None
    """None where all settings of the sweep together do not reach it."""
    by_seed: tuple[int | None, ...]


@dataclass(frozen=True)
class Replaced:
    """One run against a sweep."""

    regime: str
    run: str
    sweep: str
    missing: Mapping[str, int]
    """Cells that it rests on and that are not over, by arm; the rest is empty until they are."""
    efforts: tuple[Effort, ...] = ()
    """Of the run's arm and of the sweep; empty also where every setting of one failed."""
    levels: tuple[Level, ...] = ()


def replaced(plan: StudyPlan) -> Replaced | None:
    """None where the study does not ask."""
    asked = plan.study.content.replaces
    if asked is None:
        return None
    regime = asked.regime or next(iter(plan.study.content.regimes))
    needed = behind(plan.study.content, [asked.run, asked.sweep])
    missing = Counter(
        cell.arm
        for cell in plan.cells(regime)
        if cell.phase == "tune" and cell.arm in needed and plan.book.get(cell) is None
    )
    if missing:
        return Replaced(regime, asked.run, asked.sweep, missing)
    one, sweep = (effort(plan, regime, arm) for arm in (asked.run, asked.sweep))
    if one is None or sweep is None:
        return Replaced(regime, asked.run, asked.sweep, {})
    maximize = plan.study.content.maximize
    levels = tuple(_level(one, sweep, is_chosen, maximize) for is_chosen in (True, False))
    return Replaced(regime, asked.run, asked.sweep, {}, (one, sweep), levels)


def expected_best(values: Sequence[float], maximize: bool) -> tuple[float, ...]:
    """The mean over all choices of n of the values of the best one, for n from 1 to all: Σᵢ C(i, n − 1) vᵢ / C(N, n), v₀ the
    worst."""
    ordered, size = sorted(values, reverse=not maximize), len(values)
    return tuple(
        sum(math.comb(i, n - 1) * value for i, value in enumerate(ordered)) / math.comb(size, n)
        for n in range(1, size + 1)
    )


def fewest(level: float, best: Sequence[float], maximize: bool) -> int | None:
    """The fewest settings whose expected best is the level or better."""
    sign = 1 if maximize else -1
    reached = (n for n, value in enumerate(best, 1) if sign * value >= sign * level)
    return next(reached, None)


def effort(plan: StudyPlan, regime: str, arm: str) -> Effort | None:
    """None where no setting came to a number on every development seed."""
    maximize = plan.study.content.maximize
    each: list[list[float]] = []
    cells: list[StudyCell] = []
    for trial in range(len(plan.trials[arm])):
        row = [StudyCell(regime, arm, "tune", seed, trial) for seed in plan.study.development]
        values = [value for cell in row if (value := plan.value(cell)) is not None]
        if len(values) == len(row) and all(map(math.isfinite, values)):
            each.append(values)
            cells += row
    cost = a_run(plan, cells)
    if cost is None:
        return None
    by_seed = (expected_best(column, maximize) for column in zip(*each, strict=True))
    best = expected_best([fmean(values) for values in each], maximize)
    return Effort(arm, best, tuple(by_seed), cost)


def _level(one: Effort, sweep: Effort, is_chosen: bool, maximize: bool) -> Level:
    at = -1 if is_chosen else 0
    pairs = zip(one.by_seed, sweep.by_seed, strict=True)
    return Level(
        is_chosen,
        one.best[at],
        fewest(one.best[at], sweep.best, maximize),
        tuple(fewest(own[at], other, maximize) for own, other in pairs),
    )
