"""Parts of a page beside its tables: what there is to be gained, from where to where, for how many runs, on which way.

Each says of what is not there that it is not yet computed, and which cells are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean

from bilevel.sinks.numbers import significant
from bilevel.studying.courses import ArmCourse, Way, late
from bilevel.studying.effort import Level, Replaced
from bilevel.studying.file import BASELINE, OURS, Study
from bilevel.studying.headroom import HeadroomFound
from bilevel.studying.statistics import Interval
from bilevel.studying.summary import ComputedWith, Table

UNKNOWN = "not yet computed"
HELD = "held back"


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([line(*heads), "|---" * len(heads) + "|", *(line(*each) for each in lines)])


def line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def lacking(missing: Mapping[str, int]) -> str:
    arms = ", ".join(f"{number} of `{arm}`" for arm, number in missing.items())
    return f"Cells that it rests on and that are not there: {arms}."


def ahead(gate: HeadroomFound) -> str:
    spread = f" ± {gate.error:.2g}" if gate.error is not None else ""
    return f"the bound `{gate.bound}` is ahead of `{gate.over}` by {gate.mean:+.4g}{spread}"


def computed_with(found: ComputedWith) -> str:
    """Which arithmetic the cells were computed with, and the seeds of which not all were computed alike."""
    each = [f"{name} ({number:,} cells)" for name, number in found.cells.items()]
    if found.unrecorded:
        each.append(f"not recorded ({found.unrecorded:,})")
    if not each:
        return ""
    said = f"\nInstructions, threads and a digest of what they come to: {'; '.join(each)}.\n"
    if found.mixed:
        where = ", ".join(f"{regime} {seed}" for regime, seed in found.mixed)
        said += (
            f"\n**Seeds whose cells were not all computed alike**: {where}. Pairs of these may differ by more than "
            "their arms do.\n"
        )
    return said


def headroom(gate: HeadroomFound) -> str:
    """The verdict, what it rests on, and whether someone went on all the same."""
    asked = (
        f"in {gate.regime} {gate.spell(gate.bound, '`')} is to be ahead of {gate.spell(gate.over, '`')} by "
        f"{gate.at_least:g}, in the mean over development seeds"
    )
    lines = [f"**{gate.verdict.capitalize()}**: {asked}."]
    left = Counter(cell.arm for cell in gate.missing)
    if gate.mean is not None:
        each = ", ".join(f"{value:+.4g}" for value in gate.differences)
        lines = [
            f"**{gate.verdict.capitalize()}**: {ahead(gate)} ({each}; ± is the standard error of their mean); {asked}."
        ]
        for arm, differences in gate.passed.items():
            each = ", ".join(f"{value:+.4g}" for value in differences)
            lines.append(
                f"\n`{arm}`, an arm that is no bound, is ahead of it by {fmean(differences):+.4g} ({each}): as far as "
                f"so few seeds tell, `{gate.bound}` bounds nothing.\n"
            )
        if gate.missing:
            lines.append(f"Arms that are not computed can only lower it. {lacking(left)}")
    elif gate.failed:
        lines.append(f"It cannot be computed: {gate.failed}.")
    else:
        lines.append(lacking(left))
    if gate.early:
        lines.append(
            f"{gate.early:,} cells were run before it was met, because that was asked for (`--without-headroom`)."
        )
    return "\n".join(lines) + "\n"


def crossover(
    study: Study, tables: Sequence[Table], shown: Mapping[str, str], gate: HeadroomFound | None
) -> str:
    """Ours against the baseline along the axis: a row a regime, then from where to where it is worth it.

    `shown` are the differences by regime, as the tables have them.
    """
    at = sorted((t for t in tables if t.at is not None), key=lambda t: t.at or 0.0)
    if not at:
        return ""
    lines, verdicts = [], []
    for table in at:
        row, wanted = table.primary, len(study.test[table.regime])
        n = row.against.n if row else 0
        is_over = row is not None and n and n + len(row.failed) >= wanted
        missing = HELD if gate and gate.verdict == "not met" and not n else UNKNOWN
        said = row.verdict if row and is_over and row.verdict else missing
        verdicts.append((said, f"{table.at:g}"))
        lines.append([f"{table.at:g}", table.regime, f"{n} of {wanted}", shown[table.regime], said])
    ours, baseline = (at[0].named.get(group, group) for group in (OURS, BASELINE))
    heads = [study.content.axis or "at", "regime", "seeds", f"{ours} − {baseline}", "verdict"]
    parts = []
    for said in dict.fromkeys(said for said, _ in verdicts):
        parts.append(f"{said} at {', '.join(place for each, place in verdicts if each == said)}")
    summed = "; ".join(parts)
    return f"{rows(heads, lines)}\n\n{summed[:1].upper()}{summed[1:]}.\n"


def replaces(found: Replaced) -> str:
    """What one run comes to, and how many runs of the sweep come to as much."""
    what = f"one run of `{found.run}` against a sweep of `{found.sweep}` in {found.regime}"
    if found.missing:
        return f"**{UNKNOWN.capitalize()}**: {what}. {lacking(found.missing)}\n"
    if not found.efforts:
        return f"**Cannot be computed**: {what}; every setting of one of them failed.\n"
    one, sweep = found.efforts
    heads = [
        "",
        "comes to",
        f"runs of `{sweep.arm}`",
        "by seed",
        "gradients",
        "products",
        "seconds",
    ]
    lines = [
        [
            f"`{one.arm}`, {'the best' if level.is_chosen else 'any'} of {len(one.best)} settings",
            significant(level.value),
            _runs(level.runs, len(sweep.best)),
            ", ".join(_runs(runs, len(sweep.best)) for runs in level.by_seed),
            *_ratios(found, level),
        ]
        for level in found.levels
    ]
    note = (
        f"\nThe fewest runs of `{sweep.arm}` whose best comes to as much on average, of {len(sweep.best)} settings; gradients, "
        f"products and seconds are those of one run of `{one.arm}` / those of so many of the sweep.\n"
    )
    return f"{rows(heads, lines)}\n{note}"


def _runs(number: int | None, most: int) -> str:
    return f"{number}" if number else f"more than {most}"


def _ratios(found: Replaced, level: Level) -> Iterator[str]:
    one, sweep = found.efforts
    number = level.runs or len(sweep.best)
    more = "" if level.runs else "> "
    for name in ("gradients", "products", "seconds"):
        own, theirs = getattr(one.cost, name), number * getattr(sweep.cost, name)
        yield f"{significant(own)} / {more}{significant(theirs)}"


def courses(found: Sequence[ArmCourse]) -> str:
    """A table a regime: the shares at the beginning and at the end of each run, and how far its measures went."""
    made = []
    for regime, each in groupby(found, key=lambda arm: arm.regime):
        arms = list(each)
        names = next((list(a.ways[0].shares) for a in arms if a.ways), [])
        if not names:
            left = {arm.arm: arm.missing for arm in arms}
            made.append(f"**{regime}**: {UNKNOWN}. {lacking(left)}\n")
            continue
        heads = ["arm", *(f"{name}: begin → end" for name in names)]
        heads += [*(f"{name}: second half" for name in names), "moved", "way"]
        lines = [[_titled(arm), *_course(arm, names)] for arm in arms]
        made.append(f"**{regime}**\n\n{rows(heads, lines)}\n")
    return "\n".join(made)


def _titled(arm: ArmCourse) -> str:
    left = f" ({arm.missing} {UNKNOWN})" if arm.missing else ""
    return f"`{arm.arm}`" + (f": {arm.title}" if arm.title else "") + left


def _course(arm: ArmCourse, names: Sequence[str]) -> Iterator[str]:
    """Each seed's end, as a mean hides runs that part."""
    if not arm.ways:
        yield from ["–"] * (2 * len(names) + 2)
        return
    for name in names:
        ends = ", ".join(f"{way.shares[name][-1]:.2f}" for way in arm.ways)
        yield f"{_mean(arm.ways, name, 0):.2f} → {_mean(arm.ways, name, -1):.2f} ({ends})"
    for name in names:
        yield f"{fmean(late(way, name) for way in arm.ways):.2f}"
    yield f"{fmean(way.moved for way in arm.ways):.2f}"
    yield f"{fmean(way.length for way in arm.ways):.2f}"


def _mean(ways: Sequence[Way], name: str, at: int) -> float:
    return fmean(way.shares[name][at] for way in ways)


def difference_of(table: Table) -> Interval | None:
    """Of ours from the baseline; None where no seed has both."""
    row = table.primary
    return row.against if row and row.against.n else None
