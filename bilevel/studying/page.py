"""The parts of a page that a study writes, each between markers `<!-- study:NAME -->` and `<!-- /study:NAME -->`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bilevel.errors import RecipeError
from bilevel.runfolder.files import write_text
from bilevel.sinks.numbers import significant
from bilevel.studying import page_parts
from bilevel.studying.costs import Cost
from bilevel.studying.file import BASELINE, OURS, Study
from bilevel.studying.headroom import HeadroomFound
from bilevel.studying.page_parts import difference_of, line, rows
from bilevel.studying.results import REMEDY
from bilevel.studying.statistics import Interval
from bilevel.studying.summary import ArmRow, Findings, Table

PARTS = (
    "answer",
    "tables",
    "crossover",
    "figures",
    "tuned",
    "headroom",
    "costs",
    "replaces",
    "courses",
    "cells",
    "repeat",
)
SAID = {
    "win": "is ahead of",
    "loss": "is behind",
    "tie": "differs by no more than matters from",
    "undecided": "cannot be told from",
}
"""What a verdict says in words."""


def parts(study: Study) -> list[str]:
    """The parts that a study has something to say in."""
    content = study.content
    is_there = {
        "crossover": any(each.at is not None for each in content.regimes.values()),
        "headroom": content.headroom is not None,
        "replaces": content.replaces is not None,
        "courses": any(each.course for each in content.regimes.values()),
    }
    return [name for name in PARTS if is_there.get(name, True)]


def read(path: Path, wanted: Sequence[str] = PARTS) -> str:
    """The text of the page; one with the parts that are `wanted` where there is none.

    Raises `RecipeError` where no marker is on it.
    """
    if not path.is_file():
        made = (f"<!-- study:{name} -->\n<!-- /study:{name} -->\n" for name in wanted)
        return f"# {path.stem}\n\n" + "\n".join(made)
    text = path.read_text(encoding="utf-8")
    if not any(f"<!-- study:{name} -->" in text for name in PARTS):
        markers = ", ".join(f"<!-- study:{name} -->" for name in wanted)
        raise RecipeError(
            f"{path}: has no place for the results; write one of {markers}, and its end with a /, "
            "or delete the page to have one made"
        )
    return text


def write(path: Path, text: str) -> None:
    write_text(path, text, remedy=REMEDY, make_folder=True)


def filled(text: str, study: Study, found: Findings, figures: Sequence[Path], command: str) -> str:
    """The page with its parts made anew from what was found. Every number of a part is computed."""
    tables = found.regimes
    begun = [table for table in tables if table.done]
    apart = {t.regime: difference(d) if (d := difference_of(t)) else "–" for t in tables}
    made: Mapping[str, str] = {
        "answer": answer(study, tables, found.headroom),
        "tables": "\n".join(
            _table(study, table) for table in begun if any(r.seeds for r in table.rows)
        ),
        "crossover": page_parts.crossover(study, tables, apart, found.headroom),
        "figures": "\n".join(_figure(study, path) for path in figures),
        "tuned": "\n".join(filter(None, (_tuned(study, table) for table in begun))),
        "headroom": page_parts.headroom(found.headroom) if found.headroom else "",
        "costs": "\n".join(filter(None, (_costs(table) for table in begun))),
        "replaces": page_parts.replaces(found.replaces) if found.replaces else "",
        "courses": page_parts.courses(found.courses),
        "cells": _cells(tables) + page_parts.computed_with(found.computed_with),
        "repeat": f"```console\n$ {command}\n```\n",
    }
    for name, part in made.items():
        pattern = rf"(<!-- study:{name} -->\n).*?(<!-- /study:{name} -->)"
        part = part or "Nothing yet.\n"
        text = re.sub(pattern, lambda m, p=part: f"{m[1]}\n{p}\n{m[2]}", text, flags=re.DOTALL)
    return text


def answer(study: Study, tables: Sequence[Table], gate: HeadroomFound | None = None) -> str:
    """What is known of the first regime, in a sentence; how far it is where it is not answered.

    Where no headroom was found, that is the answer, beside what was run all the same.
    """
    table, row = tables[0], tables[0].primary
    done, cells = sum(t.done for t in tables), sum(t.cells for t in tables)
    held = _no_headroom(gate) if gate and gate.verdict == "not met" else ""
    wanted = len(study.test[table.regime])
    if row is None or row.verdict is None or row.against.n + len(row.failed) < wanted:
        if held:
            return f"{held}\n"
        named = f" Named on development seeds: {_named(table)}." if table.named else ""
        return f"**Not yet answered**: {done:,} of the {cells:,} cells that are known by now are there.{named}\n"
    seeds = f"{row.against.n} seeds"
    sentences = [
        f"**In {table.regime}, `{row.arm}` {SAID[row.verdict]} `{table.named[BASELINE]}`**, the best baseline: "
        f"{study.content.measure} {difference(row.against)} over {seeds}.",
        f"{done:,} of {cells:,} cells are there.",
    ]
    return " ".join([*sentences, *([held] if held else [])]) + "\n"


def _no_headroom(gate: HeadroomFound) -> str:
    early = f"; {gate.early:,} cells were run all the same"
    run = early if gate.early else ", so no test seed is run"
    return (
        f"**No headroom was found in {gate.regime}**: {page_parts.ahead(gate)} in the mean over "
        f"{len(gate.differences)} development seeds; at least {gate.at_least:g} was asked for{run}."
    )


def _named(table: Table) -> str:
    return ", ".join(f"{group} is `{arm}`" for group, arm in table.named.items())


def difference(found: Interval) -> str:
    """+0.021 [+0.010, +0.032]: as many decimals as tell the ends of the interval apart."""
    return _shown(found, "+")


def _value(found: Interval) -> str:
    return _shown(found, "")


def _shown(found: Interval, sign: str) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.4g}"
    width = found.high - found.low
    decimals = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 6
    form = f"{sign}.{min(decimals, 9)}f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _head(table: Table) -> str:
    return f"**{table.regime}**: {table.title}\n" if table.title else f"**{table.regime}**\n"


def _table(study: Study, table: Table) -> str:
    """A row an arm; beside the measure the means of the others that are kept."""
    first = study.content.measure
    others = _others(study, next(row.measures for row in table.rows if row.seeds))
    heads = [
        "arm",
        "seeds",
        first,
        f"− {table.named.get(BASELINE, 'baseline')}",
        "verdict",
        *others,
    ]
    lines = [_head(table), f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in (row for row in table.rows if row.seeds):
        failed = f" ({len(row.failed)} failed)" if row.failed else ""
        lines.append(
            line(
                f"`{row.arm}`" + (f": {row.title}" if row.title else ""),
                f"{len(row.seeds)}{failed}",
                _value(row.value),
                difference(row.against) if row.against.n else "–",
                row.verdict or "–",
                *_means(row.measures, others),
            )
        )
    return "\n".join(lines) + "\n"


def _others(study: Study, measures: Mapping[str, float]) -> list[str]:
    """What is shown beside the measure that counts."""
    hidden = study.content.measure, "upper_loss", "lower_loss"
    return [name for name in measures if name not in hidden and "learned/" not in name]


def _means(measures: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [f"{measures[name]:.4g}" if name in measures else "–" for name in names]


def _tuned(study: Study, table: Table) -> str:
    """What was chosen on development seeds; an arm that takes another's settings has that one's.

    Where a regime has no others, what the arms came to beside the measure. One that is looked at for the course of
    weights is shown by that.
    """
    rows = [row for row in table.rows if row.tuned]
    regime = study.content.regimes[table.regime]
    if not rows or regime.course or study.tuning(table.regime) != table.regime:
        return ""
    others = _others(study, rows[0].looked_at)
    heads = ["arm", "group", "tried", "best", "development seeds", *others]
    lines = [_head(table), line(*heads), "|---" * len(heads) + "|"]
    lines += [line(f"`{r.arm}`", r.group, *_best(r), *_means(r.looked_at, others)) for r in rows]
    named = [f"\nNamed: {_named(table)}.\n"] if OURS in table.named else []
    return "\n".join([*lines, *named]) + "\n"


def _best(row: ArmRow) -> tuple[str, str, str]:
    assert row.tuned is not None
    values = ", ".join(f"`{key}={value}`" for key, value in row.tuned.values.items())
    each = ", ".join(f"{value:.4g}" for value in row.tuned.seeds)
    return f"{row.tuned.tried}", values or "–", f"{row.tuned.mean:.4g} ({each})"


def _costs(table: Table) -> str:
    """A run of each arm on test seeds, and all that was computed to tune it."""
    kinds = ("runs", "gradients", "products", "seconds")
    lines = [
        [f"`{row.arm}`", *_spent(row.cost, kinds), *_spent(row.tuning, kinds)]
        for row in table.rows
        if row.cost or row.tuning
    ]
    if not lines:
        return ""
    return f"{_head(table)}\n{rows(['arm', *kinds, *(f'tuning: {k}' for k in kinds)], lines)}\n"


def _spent(cost: Cost | None, kinds: Sequence[str]) -> list[str]:
    return [significant(getattr(cost, kind)) if cost else "–" for kind in kinds]


def _cells(tables: Sequence[Table]) -> str:
    lines = ["| regime | done | failed | known by now |", "|---" * 4 + "|"]
    lines += [line(t.regime, f"{t.done}", f"{t.failed}", f"{t.cells}") for t in tables]
    return "\n".join(lines) + "\n"


def _figure(study: Study, path: Path) -> str:
    assert study.page is not None
    said = {
        "differences": f"{study.content.measure}: differences from the baseline with 95 % intervals; shaded, "
        f"± {study.content.margin:g}",
        "axis": f"{study.content.measure} over {study.content.axis}, with 95 % intervals",
        "runs": f"{study.content.measure} on development seeds: the expected best of so many settings",
        "courses": "shares on the way of each run on development seeds; the thick line is their mean",
    }
    return f"![{said[path.stem]}]({os.path.relpath(path, study.page.parent)})\n"
