"""Is there anything to be gained? How far a bound is ahead on development seeds, asked before a test seed is run.

A study in which no arm could win says nothing of its arms. Of an arm that knows more than the others may (the `bound`) and of
one that it has to be ahead of, each as tuned on development seeds and each the best of its group where a group is named, the
mean difference over these seeds must be `at_least` so much. It is computed from kept cells alone. Until they are there cells on
test seeds are held back, and where they say no, every other regime is too that has any. One arm that the bound is too little ahead of settles
it: the others can only lower the difference, and need not be computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from bilevel.studying.file import StudyFile, arms_of
from bilevel.studying.plan import StudyPlan, Waiting
from bilevel.studying.results import StudyCell


@dataclass(frozen=True)
class HeadroomFound:
    """What is known of a study's headroom."""

    regime: str
    bound: str
    over: str
    """The arm that the bound is compared with. Both are what the study's file says until they are named."""
    at_least: float
    differences: tuple[float, ...]
    """By development seed, positive where the bound is ahead; () until it is computed."""
    missing: tuple[StudyCell, ...]
    """Cells that it rests on, or that could have changed it, and that are not over."""
    failed: str | None
    """Why the cells say nothing."""
    early: int
    """Test cells that were run before it was met, because that was asked for."""
    groups: tuple[str, ...] = ()
    """Which of `bound` and `over` are groups, whose best arm is meant and not named yet."""
    exploratory: tuple[str, ...] = ()
    """Regimes without test seeds, which decide nothing and are never held back."""
    passed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Arms whose mean is better than the bound's, and by how much, by development seed: then the bound is none."""

    @property
    def mean(self) -> float | None:
        return fmean(self.differences) if self.differences else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean over development seeds; None of fewer than two."""
        number = len(self.differences)
        return stdev(self.differences) / number**0.5 if number > 1 else None

    @property
    def verdict(self) -> Literal["met", "not met", "not yet computed", "failed"]:
        if self.mean is None:
            return "failed" if self.failed else "not yet computed"
        return "met" if self.mean >= self.at_least else "not met"

    def holds(self, cell: StudyCell) -> bool:
        """Whether a cell is held back."""
        if self.verdict == "met" or cell.regime in self.exploratory:
            return False
        return cell.phase == "test" or (self.verdict == "not met" and cell.regime != self.regime)

    def spell(self, name: str, mark: str = "") -> str:
        """`bound` or `over` in words, an arm's name between marks."""
        return f"the best of {name}" if name in self.groups else f"{mark}{name}{mark}"

    @property
    def said(self) -> str:
        """The verdict with the numbers that it rests on, in a line."""
        bound, over = self.spell(self.bound), self.spell(self.over)
        asked = f"{bound} is to be ahead of {over} by {self.at_least:g} in {self.regime}"
        if self.mean is not None:
            each = ", ".join(f"{value:+.3g}" for value in self.differences)
            return f"headroom {self.verdict}: {asked}, and is by {self.mean:+.3g} ({each})"
        if self.failed:
            return f"headroom failed: {asked}; {self.failed}"
        left = Counter(cell.arm for cell in self.missing)
        arms = ", ".join(f"{number} of {arm}" for arm, number in left.items())
        return f"headroom not yet computed: {asked}; development cells are missing, {arms}"


def headroom(plan: StudyPlan) -> HeadroomFound | None:
    """None where the study asks for none."""
    content = plan.study.content
    asked = content.headroom
    if asked is None:
        return None
    regime = asked.regime or next(iter(content.regimes))
    bounds = _arms(plan, regime, asked.bound)
    rivals = [arm for arm in _arms(plan, regime, asked.over) if arm not in bounds]
    needed = behind(content, [*bounds, *rivals])
    tuning = [cell for cell in plan.cells(regime) if cell.phase == "tune" and cell.arm in needed]
    missing = tuple(cell for cell in tuning if plan.book.get(cell) is None)
    bound, over = asked.bound, asked.over
    differences: tuple[float, ...] = ()
    failed = None
    try:
        best = _best(plan, regime, bounds)
        rival = _best(plan, regime, rivals, tuned_only=bool(missing))
        ahead = _differences(plan, regime, best, rival)
        if not missing or fmean(ahead) < asked.at_least:  # other rivals can only lower it
            bound, over, differences = best, rival, ahead
    except Waiting as reason:
        failed = str(reason) if reason.is_final or not missing else None
    early = sum(
        kept is not None and kept.note is not None for kept in map(plan.book.get, plan.all())
    )
    groups = tuple(sorted({bound, over} - content.arms.keys()))
    exploratory = tuple(name for name, seeds in plan.study.test.items() if not seeds)
    return HeadroomFound(
        regime,
        bound,
        over,
        asked.at_least,
        differences,
        missing,
        failed,
        early,
        groups,
        exploratory,
        _passed(plan, regime, bound, bounds) if differences else {},
    )


def _arms(plan: StudyPlan, regime: str, name: str) -> list[str]:
    return [name] if name in plan.study.content.arms else plan.group(regime, name)


def _best(plan: StudyPlan, regime: str, arms: Sequence[str], *, tuned_only: bool = False) -> str:
    if len(arms) == 1:
        plan.tuned(regime, arms[0])  # raises what its settings failed of
    found = plan.best_of(regime, arms, tuned_only=tuned_only)
    if found is None:
        raise Waiting(f"every setting of every arm failed: {', '.join(arms)}", not tuned_only)
    return found


def _passed(
    plan: StudyPlan, regime: str, bound: str, bounds: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """Arms that are tuned by now and came out better than the bound."""
    found = {}
    for name in arms_of(plan.study.content, regime, {}):
        if name not in bounds and not plan.study.content.arms[name].hidden:
            with suppress(Waiting):
                ahead = _differences(plan, regime, name, bound)
                if fmean(ahead) > 0:
                    found[name] = ahead
    return found


def _differences(plan: StudyPlan, regime: str, bound: str, over: str) -> tuple[float, ...]:
    sign = 1 if plan.study.content.maximize else -1
    pairs = zip(plan.tuned(regime, bound).seeds, plan.tuned(regime, over).seeds, strict=True)
    return tuple(sign * (one - other) for one, other in pairs)


def behind(content: StudyFile, arms: Sequence[str]) -> Collection[str]:
    """These arms with all that they come after or are tuned as."""
    found: set[str] = set()
    left = list(arms)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            arm = content.arms[name]
            left += [each for each in (arm.tuned, arm.after and arm.after.arm) if each]
    return found
