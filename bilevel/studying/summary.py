"""The numbers of a study: of each regime a row an arm, with its difference from the baseline that was named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from bilevel.studying import costs
from bilevel.studying.costs import Cost
from bilevel.studying.courses import ArmCourse, courses
from bilevel.studying.effort import Replaced, replaced
from bilevel.studying.file import BASELINE, OURS, arms_of
from bilevel.studying.headroom import HeadroomFound, headroom
from bilevel.studying.plan import StudyPlan, Tuned, Waiting
from bilevel.studying.results import Kept, StudyCell
from bilevel.studying.statistics import (
    RESAMPLED,
    Floats,
    Interval,
    Verdict,
    answers,
    interval,
    verdict,
)


@dataclass(frozen=True)
class ArmRow:
    """An arm in a regime."""

    arm: str
    title: str
    group: str
    tuned: Tuned | None
    """None until all its settings were tried, and where it is not tuned in any regime."""
    seeds: tuple[int, ...]
    """Test seeds that are done."""
    failed: tuple[int, ...]
    value: Interval
    """Of the measure on test seeds."""
    against: Interval
    """Of the difference from the baseline, on the seeds that both have."""
    verdict: Verdict | None
    """None of the baseline itself, and where there is none yet."""
    measures: Mapping[str, float]
    """Means over test seeds."""
    cost: Cost | None
    """Of a run on a test seed, with the stages that it comes after: the mean."""
    looked_at: Mapping[str, float]
    """In a regime without test seeds: means over development seeds, at the setting that was tuned."""
    tuning: Cost | None
    """Of all its runs on development seeds, and of its stages."""


@dataclass(frozen=True)
class Table:
    """A regime."""

    regime: str
    title: str
    at: float | None
    done: int
    """Cells, tuning and testing."""
    failed: int
    cells: int
    named: Mapping[str, str]
    """The arms that `ours` and `baseline` are, once they are named."""
    rows: tuple[ArmRow, ...]

    @property
    def primary(self) -> ArmRow | None:
        """That of ours, against the baseline."""
        return next((row for row in self.rows if row.arm == self.named.get(OURS)), None)


@dataclass
class StudySummary:
    """Reads a plan; every number is computed from its kept cells."""

    plan: StudyPlan
    _resampled: dict[StudyCell, Floats] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        return [self.table(regime) for regime in self.plan.study.content.regimes]

    def table(self, regime: str) -> Table:
        plan, content = self.plan, self.plan.study.content
        named = plan.named(regime)
        cells = list(plan.cells(regime))
        kept = [plan.book.get(cell) for cell in cells]
        arms = [a for a in arms_of(content, regime, named) if not content.arms[a].hidden]
        return Table(
            regime,
            content.regimes[regime].title,
            content.regimes[regime].at,
            sum(each is not None and each.is_done for each in kept),
            sum(each is not None and not each.is_done for each in kept),
            len(cells),
            named,
            tuple(self._row(regime, arm, named) for arm in arms),
        )

    def _row(self, regime: str, arm: str, named: Mapping[str, str]) -> ArmRow:
        content = self.plan.study.content
        own = self._over(regime, arm)
        values = {
            seed: kept.measures[content.measure] for seed, kept in own.items() if kept.is_done
        }
        baseline = named.get(BASELINE)
        other = baseline if baseline != arm else None
        against = self.difference(regime, arm, other) if other else interval([])
        return ArmRow(
            arm,
            content.arms[arm].title,
            content.arms[arm].group,
            self._tuned(regime, arm),
            tuple(values),
            tuple(seed for seed in own if seed not in values),
            interval(list(values.values()), self._draws(regime, arm, list(values))),
            against,
            verdict(against, content.margin, content.maximize) if against.n else None,
            _means([own[seed].measures for seed in values]),
            costs.a_run(self.plan, (StudyCell(regime, arm, "test", seed) for seed in values)),
            self._looked_at(regime, arm),
            costs.tuning(self.plan, regime, arm),
        )

    def _looked_at(self, regime: str, arm: str) -> dict[str, float]:
        tuned, study = self._tuned(regime, arm), self.plan.study
        if tuned is None or study.test[regime]:
            return {}
        at = (StudyCell(regime, arm, "tune", seed, tuned.trial) for seed in study.development)
        return _means([kept.measures for kept in map(self.plan.book.get, at) if kept])

    def difference(self, regime: str, arm: str, other: str) -> Interval:
        """The mean over the test seeds that both have of arm − other, each on the same resampled units."""
        measure = self.plan.study.content.measure
        one, two = self._over(regime, arm), self._over(regime, other)
        seeds = [s for s in one if s in two and one[s].is_done and two[s].is_done]
        values = [one[seed].measures[measure] - two[seed].measures[measure] for seed in seeds]
        drawn, beside = self._draws(regime, arm, seeds), self._draws(regime, other, seeds)
        if drawn is None or beside is None:
            return interval(values)
        return interval(values, [a - b for a, b in zip(drawn, beside, strict=True)])

    def _over(self, regime: str, arm: str) -> dict[int, Kept]:
        """The test cells of an arm that are over, by seed."""
        seeds = self.plan.study.test[regime]
        found = {seed: self.plan.book.get(StudyCell(regime, arm, "test", seed)) for seed in seeds}
        return {seed: kept for seed, kept in found.items() if kept is not None}

    def _draws(self, regime: str, arm: str, seeds: Sequence[int]) -> list[Floats] | None:
        """The measure on resampled units, those of a seed the same for every arm; None without cases."""
        found = []
        for seed in seeds:
            cell = StudyCell(regime, arm, "test", seed)
            kept = self.plan.book.get(cell)
            if kept is None or kept.cases is None:
                return None
            if cell not in self._resampled:
                generator = np.random.default_rng([seed, 0])
                self._resampled[cell] = answers(kept.cases).resampled(RESAMPLED, generator)
            found.append(self._resampled[cell])
        return found

    def _tuned(self, regime: str, arm: str) -> Tuned | None:
        try:
            return self.plan.tuned(regime, arm)
        except Waiting:
            return None


def _means(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the measures that all of them have."""
    names = [n for n in (each[0] if each else ()) if all(n in one for one in each)]
    return {name: fmean(one[name] for one in each) for name in names}


@dataclass(frozen=True)
class ComputedWith:
    """On which arithmetic the cells that are done were computed, as `bilevel.runfolder.arithmetic.here` says it."""

    cells: Mapping[str, int]
    unrecorded: int
    """Cells of an earlier version, which did not say."""
    mixed: tuple[tuple[str, int], ...]
    """Regimes and seeds whose cells were computed with several."""


@dataclass(frozen=True)
class Findings:
    """All that a study's kept cells say."""

    regimes: tuple[Table, ...]
    headroom: HeadroomFound | None
    replaces: Replaced | None
    courses: tuple[ArmCourse, ...]
    computed_with: ComputedWith


def findings(plan: StudyPlan) -> Findings:
    tables = tuple(StudySummary(plan).tables())
    return Findings(
        tables, headroom(plan), replaced(plan), tuple(courses(plan)), computed_with(plan)
    )


def computed_with(plan: StudyPlan) -> ComputedWith:
    cells, each = Counter[str | None](), dict[tuple[str, int], set[str]]()
    for cell in plan.all():
        kept = plan.book.get(cell)
        if kept is not None and kept.is_done:
            cells[kept.arithmetic] += 1
            if kept.arithmetic:
                each.setdefault((cell.regime, cell.seed), set()).add(kept.arithmetic)
    mixed = tuple(where for where, found in each.items() if len(found) > 1)
    unrecorded = cells.pop(None, 0)
    return ComputedWith({str(name): number for name, number in cells.items()}, unrecorded, mixed)


def document(found: Findings) -> dict[str, Any]:
    """As plain data; of the headroom with its mean and verdict."""
    made = plain(found)
    if gate := found.headroom:
        made["headroom"] |= {"mean": gate.mean, "verdict": gate.verdict}
    return made


def plain(value: Any) -> Any:
    """Dataclasses as what JSON has."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value
