"""What an arm took: gradients, products and seconds of its cells with those of the stages that it comes after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from bilevel.studying.mixtures import points
from bilevel.studying.plan import StudyPlan, Waiting
from bilevel.studying.results import Kept, StudyCell


@dataclass(frozen=True)
class Cost:
    """Of one run, or of many."""

    gradients: float
    products: float
    """Hessian and cross products."""
    seconds: float
    runs: float


def a_run(plan: StudyPlan, cells: Iterable[StudyCell]) -> Cost | None:
    """The mean over cells, each with its stages; None where there is none."""
    each = [total(stages(plan, cell)) for cell in cells]
    if not each:
        return None
    means = (fmean(getattr(one, name) for one in each) for name in Cost.__dataclass_fields__)
    return Cost(*means)


def tuning(plan: StudyPlan, regime: str, arm: str) -> Cost | None:
    """All that was computed on development seeds to tune an arm: its settings, and those of its stages.

    None until all of it is over, and for an arm that takes what was tuned of another.
    """
    arms, chosen = plan.study.content.arms, plan.study.content.arms[arm]
    needed = {arm}
    while chosen.after:
        needed.add(chosen.after.arm)
        chosen = arms[chosen.after.arm]
    if arms[arm].tuned or plan.study.tuning(regime) != regime:
        return None
    cells = [c for c in plan.cells(regime) if c.phase == "tune" and c.arm in needed]
    kept = [plan.book.get(cell) for cell in cells]
    there = [each for each in kept if each is not None]
    return total(there) if len(there) == len(cells) else None


def total(kept: Iterable[Kept]) -> Cost:
    each = list(kept)

    def of(name: str) -> float:
        return sum(one.totals.get(name, 0.0) for one in each)

    seconds = sum(one.seconds for one in each)
    return Cost(of("gradients"), of("hvps") + of("cross_products"), seconds, len(each))


def stages(plan: StudyPlan, cell: StudyCell) -> Iterator[Kept]:
    """What is kept of a cell and of those that it came after, at the settings that were chosen of them."""
    arm = plan.study.content.arms[cell.arm]
    for each in _runs(plan, cell):
        if (kept := plan.book.get(each)) is not None:
            yield kept
    if arm.after:
        before = arm.after.arm
        try:
            is_single = plan.study.content.arms[before].mixtures is None
            is_tuned = cell.phase == "tune" and is_single
            trial = plan.tuned(cell.regime, before).trial if is_tuned else None
        except Waiting:
            return
        yield from stages(plan, StudyCell(cell.regime, before, cell.phase, cell.seed, trial))


def _runs(plan: StudyPlan, cell: StudyCell) -> Sequence[StudyCell]:
    mixtures = plan.study.content.arms[cell.arm].mixtures
    if mixtures is None:
        return [cell]
    return [
        StudyCell(cell.regime, cell.arm, cell.phase, cell.seed, point=point)
        for point in range(len(points(mixtures, cell.seed)))
    ]
