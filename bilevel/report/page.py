"""The page of a report: summary, tables and charts, with scripts and pictures inlined."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bilevel.errors import CheckpointError
from bilevel.events import HELD, HELD_NOTE
from bilevel.recipe.yaml_source import parse
from bilevel.report.charts import charts, metric_charts
from bilevel.report.history import History, read
from bilevel.runfolder.folder import RunFolder
from bilevel.sinks.numbers import spelled


def render(folder: RunFolder) -> str:
    """The whole page as one text."""
    history = read(folder.path)
    resolved = folder.resolved.read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("bilevel", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [*charts(history), *metric_charts(history)]
    return environment.get_template("report.html.j2").render(
        name=history.started["name"],
        run=folder.path.name,
        status=_status(history),
        facts=list(_facts(folder, history, resolved)),
        charts=charts(history),
        metric_charts=metric_charts(history),
        metrics=list(_metrics(history)),
        held_note=HELD_NOTE if history.held else None,
        warnings=list(_warnings(history)),
        figures=list(_figures(folder)),
        resolved=resolved,
        specs=Markup(_script([chart.spec for chart in drawn])),
        vega=Markup(
            vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
                "</script", "<\\/script"
            )
        ),
    )


def _status(history: History) -> str:
    done, steps = (history.steps or [0])[-1], history.started["steps"]
    reason = history.finished["reason"] if history.finished else "not finished"
    return f"{reason}, {done:,} of {steps:,} upper steps"


def _warnings(history: History) -> Iterator[tuple[int, str, str]]:
    """(step, message, at how many steps it held, where the run's end says so)."""
    ended = history.finished or {}
    counts = ended.get("warned", {})  # a record of an older version has none
    for warning in history.warnings:
        count = counts.get(warning["kind"], 0)
        often = f"At {count:,} of {ended['step']:,} steps." if count else ""
        yield warning["step"], warning["message"], often


def _facts(folder: RunFolder, history: History, resolved: str) -> Iterator[tuple[str, str]]:
    content = parse(resolved, str(folder.resolved)).data
    if absent := {"problem", "lower", "upper", "estimator", "seed"} - content.keys():
        raise CheckpointError(f"{folder.resolved}: lacks {min(absent)}: it was cut off or altered")
    about, started = folder.environment(), history.started
    yield "Problem", _inline(content["problem"])
    yield "Variables", f"{started['num_upper']:,} upper, {started['num_lower']:,} lower"
    yield "Lower level", _inline(content["lower"])
    yield "Upper level", _inline(content["upper"])
    yield "Estimator", _inline(content["estimator"])
    if history.steps:
        kinds = ("gradients", "hvps", "cross_products")
        yield "Oracle calls", spelled(*(history.columns[name][-1] for name in kinds))
        each = history.seconds / len(history.steps)
        yield "Time in steps", f"{_seconds(history.seconds)}, {_seconds(each)} a step"
    yield "Device", f"{started['device']}, {started['dtype']}, {about.get('threads')} threads"
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


def _inline(section: Any) -> str:
    if isinstance(section, dict):
        options = ", ".join(f"{k} {_inline(v)}" for k, v in section.items() if k != "name")
        if "name" not in section:
            return options
        return f"{section['name']} ({options})" if options else str(section["name"])
    return json.dumps(section) if isinstance(section, (bool, type(None))) else str(section)


def _metrics(history: History) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, what its row shows below which title) of each measure."""
    for name in history.metrics:
        curve = history.metric(name)
        if curve:
            (_, first), (_, last) = curve[0], curve[-1]
            held = history.held.get(name, math.nan)
            row = {
                "before": _short(first),
                HELD: _short(held),
                "after": _short(last),
                "change": _signed(last - first if len(curve) > 1 else math.nan),
                "owed to x": _signed(last - held),
            }
            left_out = () if history.held else (HELD, "owed to x")
            yield name, {title: cell for title, cell in row.items() if title not in left_out}


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _signed(value: float) -> str:
    return f"{value:+.4g}" if math.isfinite(value) else "–"


def _figures(folder: RunFolder) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.figures.glob("*.png")):
        yield path.stem, base64.b64encode(path.read_bytes()).decode()


def _script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
