"""The cells of a study in their order, and with what settings each is run: tuned on development seeds, then compared.

A cell may rest on others: an arm on what was tuned, or on the weights that another arm came to at the same
seed. Nothing is kept of that but the cells themselves, so that any number of processes agree on it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean

from bilevel.studying.file import BASELINE, OURS, After, Study, StudyArm, arms_of, words
from bilevel.studying.mixtures import Weights, chosen, points
from bilevel.studying.results import Book, Kept, StudyCell
from bilevel.sweeping.space import MOST_POINTS, Choices, Dimension, Range, written

Words = Mapping[str, str]
"""Settings with their values as an override has them."""


class Waiting(Exception):
    """A cell rests on others that are not over; or on one that failed, and then it never runs."""

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True)
class Tuned:
    """The setting of an arm with the best mean on the development seeds."""

    trial: int
    values: Words
    mean: float
    seeds: tuple[float, ...]
    tried: int


@dataclass(frozen=True)
class Asked:
    """Which cells are asked for; () stands for all."""

    phases: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def __contains__(self, cell: StudyCell) -> bool:
        asked = (
            (self.phases, cell.phase),
            (self.regimes, cell.regime),
            (self.arms, cell.arm),
            (self.seeds, cell.seed),
        )
        return all(not some or one in some for some, one in asked)


@dataclass
class StudyPlan:
    """A study with what is kept of it."""

    study: Study
    book: Book
    _tuned: dict[tuple[str, str], Tuned] = field(default_factory=dict)

    @property
    def _arms(self) -> Mapping[str, StudyArm]:
        return self.study.content.arms

    @cached_property
    def trials(self) -> Mapping[str, list[Words]]:
        """The settings that are tried of each arm: its grid, or some of it, or random values; one where none varies."""
        most, seed = self.study.content.trials, self.study.content.sampler_seed
        return {name: tried(space, most, seed) for name, space in self.study.spaces.items()}

    def cells(self, regime: str) -> Iterator[StudyCell]:
        """All cells of a regime that are known by now, in the order in which they are run.

        Tuning arm by arm, all settings on one seed before the next, as a process may go on with what it made for
        a seed; then the test seeds, all arms of one before the next.
        """
        if self.study.tuning(regime) == regime:
            for arm in arms_of(self.study.content, regime, {}):
                for seed, trial in itertools.product(
                    self.study.development, range(len(self.trials[arm]))
                ):
                    yield from self._of(StudyCell(regime, arm, "tune", seed, trial))
        arms = arms_of(self.study.content, regime, self.named(regime))
        for seed, arm in itertools.product(self.study.test[regime], arms):
            yield from self._of(StudyCell(regime, arm, "test", seed))

    def _of(self, cell: StudyCell) -> Iterator[StudyCell]:
        """A cell, or one a mixture."""
        mixtures = self._arms[cell.arm].mixtures
        if mixtures is None:
            yield cell
            return
        for point in range(len(points(mixtures, cell.seed))):
            yield StudyCell(cell.regime, cell.arm, cell.phase, cell.seed, point=point)

    def all(self) -> Iterator[StudyCell]:
        return (cell for regime in self.study.content.regimes for cell in self.cells(regime))

    def missing(self, asked: Asked) -> list[StudyCell]:
        """Those that are asked for and not over, in their order."""
        return [cell for cell in self.all() if cell in asked and self.book.get(cell) is None]

    def value(self, cell: StudyCell) -> float | None:
        """The measure; None where the cell is not over, NaN where it failed."""
        kept = self.book.get(cell)
        if kept is None:
            return None
        return kept.measures[self.study.content.measure] if kept.is_done else math.nan

    def tuned(self, regime: str, arm: str) -> Tuned:
        """What was tuned of an arm, in the regime that says so. Raises `Waiting` until all trials are over."""
        at = self.study.tuning(regime), arm
        if at not in self._tuned:
            self._tuned[at] = self._tune(*at)
        return self._tuned[at]

    def _tune(self, regime: str, arm: str) -> Tuned:
        seeds = self.study.development
        found: list[Tuned] = []
        for trial, values in enumerate(self.trials[arm]):
            each = [self.value(StudyCell(regime, arm, "tune", seed, trial)) for seed in seeds]
            if None in each:
                raise Waiting(f"{regime}/{arm} is not tuned yet")
            known = tuple(value for value in each if value is not None)
            found.append(Tuned(trial, values, fmean(known), known, len(self.trials[arm])))
        alive = [each for each in found if math.isfinite(each.mean)]
        if not alive:
            raise Waiting(f"{regime}/{arm}: every setting failed on a development seed", True)
        return (max if self.study.content.maximize else min)(alive, key=lambda each: each.mean)

    def named(self, regime: str) -> dict[str, str]:
        """The arms of the groups `ours` and `baseline` with the best mean on development seeds, once all are tuned."""
        regime = self.study.tuning(regime)
        try:
            found = {group: self.best(regime, group) for group in (OURS, BASELINE)}
        except Waiting:
            return {}
        return {group: arm for group, arm in found.items() if arm is not None}

    def group(self, regime: str, group: str) -> list[str]:
        """The arms of a group that a regime shows."""
        return [
            name
            for name in arms_of(self.study.content, regime, {})
            if self._arms[name].group == group and not self._arms[name].hidden
        ]

    def best(self, regime: str, group: str) -> str | None:
        """The arm of a group with the best mean on development seeds; None where every arm of it failed.

        Raises `Waiting` until all of them are tuned.
        """
        return self.best_of(regime, self.group(regime, group))

    def best_of(self, regime: str, arms: Sequence[str], *, tuned_only: bool = False) -> str | None:
        """As `best`, of these arms; `tuned_only` of those that are tuned by now, without waiting for the others."""
        means: dict[str, float] = {}
        for name in arms:
            try:
                means[name] = self.tuned(regime, name).mean
            except Waiting as waiting:
                if not (waiting.is_final or tuned_only):
                    raise
        best = max if self.study.content.maximize else min
        return best(means, key=lambda name: means[name]) if means else None

    def overrides(self, cell: StudyCell) -> list[str]:
        """The overrides of the recipe that a cell is run with. Raises `Waiting` for what it rests on."""
        content, arm = self.study.content, self._arms[cell.arm]
        phase = content.development if cell.phase == "tune" else content.test
        merged = _merged(
            words(content.settings),
            words(content.regimes[cell.regime].settings),
            words(phase),
            self.tuned(cell.regime, arm.tuned).values if arm.tuned else {},
            words(arm.settings),  # which say more of this arm than what was tuned of another
            self._values(cell, arm),
            self._taken(cell, arm.after) if arm.after else {},
            self._mixed(cell) if cell.point is not None else {},
            {key: str(cell.seed) for key in content.seeds.sets},
        )
        return [f"{key}={value}" for key, value in merged.items()]

    def _values(self, cell: StudyCell, arm: StudyArm) -> Words:
        if arm.mixtures or arm.tuned:
            return {}
        if cell.trial is not None:
            return self.trials[cell.arm][cell.trial]
        return self.tuned(cell.regime, cell.arm).values

    def _taken(self, cell: StudyCell, after: After) -> Words:
        if after.choose:
            return self._chosen(cell, after)
        trial = self.tuned(cell.regime, after.arm).trial if cell.phase == "tune" else None
        measures = self._over(
            StudyCell(cell.regime, after.arm, cell.phase, cell.seed, trial)
        ).measures
        found: dict[str, str] = {}
        for pattern, setting in after.take.items():
            before, _, behind = pattern.partition("*")
            for name, value in measures.items():
                if fnmatchcase(name, pattern):
                    star = name.removeprefix(before).removesuffix(behind) if "*" in pattern else ""
                    found[setting.replace("*", star)] = repr(value)
        if not found:
            raise Waiting(f"{cell}: {after.arm} has no measure {' or '.join(after.take)}", True)
        return found

    def _chosen(self, cell: StudyCell, after: After) -> Words:
        mixtures = self._arms[after.arm].mixtures
        assert mixtures is not None
        values = []
        for point in range(len(points(mixtures, cell.seed))):
            at = StudyCell(cell.regime, after.arm, cell.phase, cell.seed, point=point)
            if (kept := self.book.get(at)) is None:
                raise Waiting(f"{at} is not over")
            values.append(kept.measures.get(after.by, math.nan))
        if not any(map(math.isfinite, values)):
            raise Waiting(f"{cell}: no run of {after.arm} came to a {after.by}", True)
        return _weights(mixtures.over, mixtures.names, chosen(after, mixtures, cell.seed, values))

    def _mixed(self, cell: StudyCell) -> Words:
        mixtures = self._arms[cell.arm].mixtures
        assert mixtures is not None
        assert cell.point is not None
        return _weights(mixtures.over, mixtures.names, points(mixtures, cell.seed)[cell.point])

    def _over(self, cell: StudyCell) -> Kept:
        kept = self.book.get(cell)
        if kept is None:
            raise Waiting(f"{cell} is not over")
        if not kept.is_done:
            raise Waiting(f"{cell} failed", True)
        return kept

    def altered(self, cell: StudyCell) -> str | None:
        """What is other now than when a kept cell was run, None where nothing is."""
        kept = self.book.get(cell)
        if kept is None:
            return None
        try:
            now = self.overrides(cell)
        except Waiting:
            return None  # of what it rests on something was deleted, and will be computed again
        before, there = set(kept.assignments), set(now)
        differ = sorted(there - before) or sorted(before - there)
        return differ[0] if differ else None


def tried(space: Sequence[Dimension], most: int, seed: int) -> list[Words]:
    """Points of a space: the whole grid where it has at most so many, else as many drawn from it, without repetition.

    Where a range has no number of points, or the grid more than 10,000, Optuna's random sampler with this seed.
    """
    sizes = [_size(each) for each in space]
    if math.prod(sizes) <= MOST_POINTS:
        grid = list(itertools.product(*(each.grid() for each in space)))
        if len(grid) > most:
            grid = random.Random(seed).sample(grid, most)
        return [_written(space, values) for values in grid]
    import optuna

    from bilevel.sweeping.study import distributions, require

    require()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = [study.ask(distributions(space)).params for _ in range(most)]
    return [_written(space, [params[each.key] for each in space]) for params in drawn]


def _size(each: Dimension) -> float:
    """How many values a grid would have."""
    if isinstance(each, Choices):
        return len(each.values)
    if each.points is None:
        return each.high - each.low + 1 if each.is_int else math.inf
    return each.points


def _written(space: Sequence[Dimension], values: Sequence[float | str]) -> Words:
    pairs = zip(space, values, strict=True)
    return {
        each.key: written(value, isinstance(each, Range) and each.is_int) for each, value in pairs
    }


def _weights(over: str, names: Sequence[str], weights: Weights) -> Words:
    return {
        f"{over}.{name}": f"{float(weight):.6g}"
        for name, weight in zip(names, weights, strict=True)
    }


def _merged(*parts: Words) -> Words:
    """Later ones over earlier ones; a setting stands where it was given last, as it may be below another."""
    found: dict[str, str] = {}
    for part in parts:
        for key, value in part.items():
            found.pop(key, None)
            found[key] = value
    return found
