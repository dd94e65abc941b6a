"""The page of many runs: results of arms over seeds, what differs, curves, figures side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bilevel.events import HELD
from bilevel.recipe.settings import shown
from bilevel.report import seeds
from bilevel.report.arms import Arm, Run, Selection, Settings, named, select, sorted_out
from bilevel.report.curves import MOST_ARMS, pairs, strokes
from bilevel.report.page import command
from bilevel.report.pictures import embedded
from bilevel.report.template import fill
from bilevel.runfolder.folder import RunFolder
from bilevel.sinks.numbers import interval, significant

MOST_FIGURES = 60
"""Pictures of a page; beyond that each would be a stamp."""
WIDEST = 8
"""Settings that a table has room for side by side."""
Table = tuple[list[str], list[tuple[str, list[str]]]]
"""(heads, rows with their name): the first head is that of the names."""
Figures = list[tuple[str, list[tuple[str, str | None]]]]


def render(folders: Sequence[RunFolder], title: str, made_by: str) -> str:
    """The whole page as one text; a run that cannot be read costs its own row."""
    found = select(folders)
    drawn = _drawn(found.arms)
    charts = pairs(drawn) if drawn else []
    figures, no_room = _figures(found.arms)
    specs = [spec for pair in charts for spec in (pair.steps, pair.calls)]
    runs = [run for arm in found.arms for run in arm.runs]
    return fill(
        "several.html.j2",
        specs,
        title=title,
        arms=len(found.arms),
        runs=len(runs),
        made_by=made_by,
        measures=_measures(found.arms),
        has_intervals=any(len(arm.runs) > 1 for arm in found.arms),
        has_control=any(run.history.held for run in runs),
        effort=_effort(found.arms),
        settings=_settings(found.arms),
        options=_options(found.arms),
        warnings=list(_warnings(found.arms)),
        legend=[
            (arm.name, color, " ".join(map(str, dash)), _ends(arm))
            for arm, (color, dash) in zip(drawn, strokes(len(drawn)), strict=True)
        ],
        not_drawn=len(found.arms) - len(drawn),
        charts=charts,
        figures=figures,
        no_room=no_room,
        each=_runs(found),
        commands=[(str(run.folder.path), command(run.folder, _about(run))) for run in runs],
        repeated=[str(run.folder.path) for run in found.repeated],
        damaged=found.damaged,
    )


def _drawn(arms: Sequence[Arm]) -> list[Arm]:
    """The arms whose curves are drawn: all, or those with the least F at the end."""

    def result(arm: Arm) -> float:
        found = seeds.mean(_last(arm, "upper_loss")).mean
        return math.inf if math.isnan(found) else found

    best = sorted(arms, key=result)[:MOST_ARMS]
    return [arm for arm in arms if arm in best]


def _last(arm: Arm, column: str) -> list[float]:
    points = (run.history.points(column) for run in arm.runs)
    return [each[-1][1] for each in points if each]


def _table(arms: Sequence[Arm], columns: Mapping[str, Callable[[Run], float]]) -> Table | None:
    """Means over seeds; a column that no run has is left out."""
    values = {
        head: [[v for v in map(of, arm.runs) if math.isfinite(v)] for arm in arms]
        for head, of in columns.items()
    }
    heads = [head for head, by_arm in values.items() if any(by_arm)]
    if not heads:
        return None
    rows = []
    for n, arm in enumerate(arms):
        cells = [_cell(values[head][n], len(arm.runs)) for head in heads]
        rows.append((arm.name, [_seeds(arm), *cells]))
    return ["arm", "seeds", *heads], rows


def _seeds(arm: Arm) -> str:
    """How many there are, and what became of those that are not done."""
    ends = Counter(run.status for run in arm.runs if run.status != "done")
    return ", ".join([str(len(arm.runs)), *(f"{count} {end}" for end, count in ends.items())])


def _cell(values: Sequence[float], runs: int) -> str:
    found = seeds.mean(values)
    some = f" (of {found.n})" if 0 < found.n < runs else ""
    return interval(found.mean, found.half) + some


def _measures(arms: Sequence[Arm]) -> Table | None:
    """Measures that were not taken at a run's last step are left out of the means."""
    names = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.history.metrics)
    columns: dict[str, Callable[[Run], float]] = {}
    for name in names:
        columns[name] = lambda run, name=name: run.history.last_metrics.get(name, math.nan)
        columns[f"{name}, {HELD}"] = lambda run, name=name: run.history.held.get(name, math.nan)
        columns[f"{name}, owed to x"] = lambda run, name=name: (
            run.history.last_metrics.get(name, math.nan) - run.history.held.get(name, math.nan)
        )
    columns["upper loss F"] = lambda run: _end(run.history.points("upper_loss"))
    columns["lower loss G"] = lambda run: _end(run.history.points("lower_loss"))
    return _table(arms, columns)


def _effort(arms: Sequence[Arm]) -> Table | None:
    return _table(
        arms,
        {
            "upper steps": lambda run: float((run.history.steps or [0])[-1]),
            "oracle calls": lambda run: [*run.history.calls.values()][-1],
            "gradients": lambda run: _end_of(run, "gradients"),
            "HVPs": lambda run: _end_of(run, "hvps"),
            "cross products": lambda run: _end_of(run, "cross_products"),
            "seconds in steps": lambda run: run.history.seconds,
            "MB sent by each rank": lambda run: (
                math.fsum(size for _, size in run.history.points("bytes")) / 1e6 or math.nan
            ),
        },
    )


def _end(points: Sequence[tuple[int, float]]) -> float:
    return points[-1][1] if points else math.nan


def _end_of(run: Run, column: str) -> float:
    return (run.history.columns[column] or [math.nan])[-1]


def _settings(arms: Sequence[Arm]) -> Table | None:
    """What tells the arms apart: a row an arm, a column a setting, or the other way round if narrower."""
    keys, _ = sorted_out([arm.settings for arm in arms])
    if not keys:
        return None
    columns = [(arm.name, arm.settings) for arm in arms]
    if len(keys) > max(len(arms), WIDEST):
        return _by_setting(keys, columns)
    rows = [(name, [_value(settings, key) for key in keys]) for name, settings in columns]
    return ["arm", *keys], rows


def _options(arms: Sequence[Arm]) -> Table | None:
    """What follows from the names of components that differ: a column for each combination of them."""
    told, keys = sorted_out([arm.settings for arm in arms])
    if not keys:
        return None
    chosen = {tuple(arm.settings.get(key) for key in keys): arm for arm in arms}
    names = [key for key in told if key.endswith(".name")]
    heads = named([{key: arm.settings[key] for key in names} for arm in chosen.values()])
    settings = [arm.settings for arm in chosen.values()]
    return _by_setting(keys, list(zip(heads, settings, strict=True)))


def _by_setting(keys: Sequence[str], columns: Sequence[tuple[str, Settings]]) -> Table:
    rows = [(key, [_value(settings, key) for _, settings in columns]) for key in keys]
    return ["setting", *(name for name, _ in columns)], rows


def _value(settings: Settings, key: str) -> str:
    return shown(settings[key], True) if key in settings else "–"


def _warnings(arms: Sequence[Arm]) -> Iterator[tuple[str, str, str]]:
    """(in which runs, message, how often): each kind of warning of an arm once."""
    for arm in arms:
        kinds: dict[str, tuple[str, int]] = {}
        for run in arm.runs:
            for warning in run.history.warnings:
                message, count = kinds.get(warning["kind"], (warning["message"], 0))
                kinds[warning["kind"]] = message, count + 1
        for message, count in kinds.values():
            yield arm.name, message, f"In {count} of {len(arm.runs)} runs."


def _ends(arm: Arm) -> str:
    """Where an arm's curves end before one of its runs does."""
    steps = [(run.history.steps or [0])[-1] for run in arm.runs]
    if min(steps) == max(steps):
        return ""
    return f"until step {min(steps):,}, where its shortest run ends; the longest has {max(steps):,}"


def _figures(arms: Sequence[Arm]) -> tuple[Figures, list[str]]:
    """(name, (arm, data) side by side) of each figure, from the first run of an arm that has it; what has no room."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for arm in arms:
        paths: dict[str, Any] = {}
        for run in arm.runs:
            for path in sorted(run.folder.figures.glob("*.png")):
                paths.setdefault(path.stem, (f"{arm.name}, seed {run.seed}", path))
        for name, entry in paths.items():
            found.setdefault(name, []).append(entry)
    every = [(name, *entry) for name, entries in found.items() for entry in entries]
    flat = every[:MOST_FIGURES]
    data = embedded([path for _, _, path in flat]) if flat else []
    shown_: dict[str, list[tuple[str, str | None]]] = {}
    for (name, label, _), source in zip(flat, data, strict=True):
        shown_.setdefault(name, []).append((label, source))
    left = [f"{name} ({label})" for name, label, _ in every[MOST_FIGURES:]]
    return list(shown_.items()), left


def _runs(found: Selection) -> Table:
    rows = []
    for arm in found.arms:
        for run in arm.runs:
            step, steps = (run.history.steps or [0])[-1], run.history.started["steps"]
            loss = significant(_end(run.history.points("upper_loss")))
            cells = [arm.name, run.seed, run.status, f"{step:,}/{steps:,}", loss]
            rows.append((str(run.folder.path), cells))
    return ["run", "arm", "seed", "ended", "steps", "upper loss F"], rows


def _about(run: Run) -> dict[str, Any]:
    try:
        return run.folder.environment()
    except Exception:  # the page needs the command alone, which can be told without it
        return {}
