"""The page of one run: result, warnings, figures, charts, setting and recipe."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from bilevel.errors import CheckpointError
from bilevel.events import COMPLETE, EARLY, HELD, HELD_NOTE
from bilevel.recipe.settings import NUMERIC
from bilevel.recipe.yaml_source import parse
from bilevel.report.charts import charts, metric_charts
from bilevel.report.history import CALLS, History, read
from bilevel.report.pictures import embedded
from bilevel.report.template import fill
from bilevel.runfolder.folder import RunFolder
from bilevel.sinks.numbers import at_end, signed, significant, spelled


def render(folder: RunFolder) -> str:
    """The whole page as one text."""
    history = read(folder.path)
    ended = history.finished or {}
    resolved = folder.resolved.read_text(encoding="utf-8")
    about = folder.environment()
    along, measured = charts(history), metric_charts(history)
    figures = sorted(folder.figures.glob("*.png"))
    names = [path.stem for path in figures]
    return fill(
        "report.html.j2",
        [chart.spec for chart in (*along, *measured)],
        name=history.started["name"],
        run=folder.path.name,
        status=_status(history),
        failure=None if ended.get("reason") in COMPLETE else ended.get("message"),
        repeat=command(folder, about),
        measures=_measures(history),
        held_note=HELD_NOTE if history.held else None,
        warnings=list(_warnings(history)),
        figures=list(zip(names, embedded(figures), strict=True)),
        charts=along,
        metric_charts=measured,
        facts=list(_facts(content_of(folder, resolved), about, history)),
        resolved=resolved,
    )


def command(folder: RunFolder, about: Mapping[str, Any]) -> str:
    """The command that made a run; of a record that does not have it, one that repeats the run."""
    made = about.get("command")
    if isinstance(made, list) and made:
        return shlex.join(map(str, made))
    return shlex.join(["bilevel", "run", str(folder.resolved)])


def content_of(folder: RunFolder, resolved: str) -> dict[str, Any]:
    """What a resolved recipe holds, read without building it.

    Raises `CheckpointError` where something that every recipe has is not there.
    """
    content = parse(resolved, str(folder.resolved)).data
    absent = set(NUMERIC) - content.keys()
    if not absent and "steps" not in (content["upper"] or {}):
        absent = {"upper.steps"}
    if absent:
        raise CheckpointError(f"{folder.resolved}: lacks {min(absent)}: it was cut off or altered")
    return content


def _status(history: History) -> str:
    done, steps = (history.steps or [0])[-1], history.started["steps"]
    reason = history.finished["reason"] if history.finished else "not finished"
    why = f": {history.finished['message']}" if history.finished and reason == EARLY else ""
    return f"{reason}, {done:,} of {steps:,} upper steps{why}"


def _warnings(history: History) -> Iterator[tuple[str, str, str]]:
    """(when it was said, message, at how many steps it held, where the run's end says so)."""
    ended = history.finished or {}
    counts = ended.get("warned", {})  # a record of an older version has none
    for warning in history.warnings:
        count = counts.get(warning["kind"], 0)
        often = f"At {count:,} of {ended['step']:,} steps." if count else ""
        yield f"Step {warning['step']:,}", warning["message"], often


def _facts(
    content: Mapping[str, Any], about: Mapping[str, Any], history: History
) -> Iterator[tuple[str, str]]:
    started = history.started
    yield "Problem", _inline(content["problem"])
    yield "Variables", f"{started['num_upper']:,} upper, {started['num_lower']:,} lower"
    yield "Lower level", _inline(content["lower"])
    yield "Upper level", _inline(content["upper"])
    yield "Estimator", _inline(content["estimator"])
    if history.steps:
        yield "Oracle calls", spelled(*(history.columns[name][-1] for name in CALLS))
        each = history.seconds / len(history.steps)
        yield "Time in steps", f"{_seconds(history.seconds)}, {_seconds(each)} a step"
    if sent := [size for _, size in history.points("bytes")]:
        sums = [count for _, count in history.points("sums")]
        each = f"{median(sums):,.0f} sums of {_size(median(sent))} a step"
        yield (
            "Sent by each rank",
            f"{math.fsum(sums):,.0f} sums of {_size(math.fsum(sent))}; {each}, in the median",
        )
    computed = [started["device"], started["dtype"], f"{about.get('threads')} threads"]
    yield "Device", ", ".join(filter(None, [*computed, about.get("instructions")]))
    yield "Seed", str(content["seed"])
    yield "Recipe hash", about["hash"][:12]
    if about.get("overrides"):
        yield "Overrides", " ".join(about["overrides"])
    yield "Begun", about.get("time", "")
    packages = about.get("packages", {})
    yield "Versions", ", ".join(f"{name} {version}" for name, version in packages.items())


def _seconds(value: float) -> str:
    """To three digits, never as a power of ten: 1.51 s, 420 ms, 12,345 s."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def _size(count: float) -> str:
    """Of so many bytes: 312 B, 53.1 kB, 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _inline(section: Any) -> str:
    if isinstance(section, dict):
        options = ", ".join(f"{k} {_inline(v)}" for k, v in section.items() if k != "name")
        if "name" not in section:
            return options
        return f"{section['name']} ({options})" if options else str(section["name"])
    return json.dumps(section) if isinstance(section, (bool, type(None))) else str(section)


def _measures(history: History) -> tuple[list[str], list[tuple[str, list[str]]]] | None:
    """(heads, rows) of the table of measures; of a problem without any, of its losses."""
    names = [name for name in history.metrics if history.metric(name)]
    title, is_one = "after", False
    if names:
        (start, before), (at, after) = history.evaluations[0], history.evaluations[-1]
        before = {} if start else before  # where it was not taken before the first step
        title, after = at_end(after, at, (history.steps or [0])[-1])
    else:
        losses = {"upper loss F": "upper_loss", "lower loss G": "lower_loss"}
        curves = {name: history.curve(column) for name, column in losses.items()}
        names = [name for name, curve in curves.items() if curve]
        before = {name: curves[name][0][1] for name in names}
        after = {name: curves[name][-1][1] for name in names}
        is_one = len(history.steps) < 2
    if not names:
        return None
    rows = []
    for name in names:
        first, last, held = (of.get(name, math.nan) for of in (before, after, history.held))
        row = {
            "before": significant(first),
            HELD: significant(held),
            title: significant(last),
            "change": signed(math.nan if is_one else last - first),
            "owed to x": signed(last - held),
        }
        left_out = () if history.held else (HELD, "owed to x")
        rows.append((name, {title: cell for title, cell in row.items() if title not in left_out}))
    return ["", *rows[0][1]], [(name, [*row.values()]) for name, row in rows]
