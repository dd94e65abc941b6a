"""How measures went on the way of a run: the share that some of them have of all, and how far they all moved.

Of a regime that asks for it (`course: {name: [measures]}`) the measures of those names are kept at every evaluation. They
are positive and weights of something: p is what each has of their sum, the distance of two such points
½ Σᵢ |pᵢ − qᵢ|. Taken from development cells alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean

from bilevel.studying.file import arms_of
from bilevel.studying.plan import StudyPlan
from bilevel.studying.results import Kept, StudyCell


@dataclass(frozen=True)
class Way:
    """One run."""

    seed: int
    steps: tuple[int, ...]
    shares: Mapping[str, tuple[float, ...]]
    """Of the measures of each name, at these steps."""
    moved: float
    """The distance from the first point to the last."""
    length: float
    """The distances from each to the next, added: what is above `moved` was gone to and fro."""


@dataclass(frozen=True)
class ArmCourse:
    """An arm of a regime, its runs on development seeds; () until one is over."""

    regime: str
    arm: str
    title: str
    ways: tuple[Way, ...]
    missing: int
    """Development seeds whose run is not over, or failed."""


def courses(plan: StudyPlan) -> list[ArmCourse]:
    """A row an arm, of the regimes that ask for it."""
    content = plan.study.content
    found: list[ArmCourse] = []
    for name, regime in content.regimes.items():
        if not regime.course:
            continue
        for arm in (each for each in arms_of(content, name, {}) if not content.arms[each].hidden):
            ways = [
                way
                for seed in plan.study.development
                if (way := _way(plan.book.get(_cell(plan, name, arm, seed)), seed, regime.course))
            ]
            left = len(plan.study.development) - len(ways)
            found.append(ArmCourse(name, arm, content.arms[arm].title, tuple(ways), left))
    return found


def _cell(plan: StudyPlan, regime: str, arm: str, seed: int) -> StudyCell:
    """Of the first setting: what the way is looked at of varies nothing."""
    return StudyCell(plan.study.tuning(regime), arm, "tune", seed, 0)


def _way(kept: Kept | None, seed: int, names: Mapping[str, Sequence[str]]) -> Way | None:
    course = kept.course if kept else None
    if not course:
        return None
    steps, rows = course["step"], {n: v for n, v in course.items() if n != "step"}
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    parts = {
        n: [v / total for v, total in zip(row, totals, strict=True)] for n, row in rows.items()
    }
    points = list(zip(*parts.values(), strict=True))
    shares = {
        name: tuple(
            sum(parts[n][at] for n in parts if any(fnmatchcase(n, each) for each in patterns))
            for at in range(len(steps))
        )
        for name, patterns in names.items()
    }
    length = sum(map(distance, points, points[1:]))
    return Way(seed, tuple(map(int, steps)), shares, distance(points[0], points[-1]), length)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """½ Σ |pᵢ − qᵢ|: 0 of the same, 1 of two that share nothing."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def late(way: Way, name: str) -> float:
    """The mean of a share over the second half of the way: what averaging would come to."""
    share = way.shares[name]
    return fmean(share[len(share) // 2 :])
