"""Pages of `compare` and `check`, from the documents that these write: figure, table, what each column means."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from bilevel.recipe.yaml_source import to_yaml
from bilevel.report.charts import WIDTH
from bilevel.report.pictures import embedded
from bilevel.report.template import fill
from bilevel.sinks.numbers import counts, significant
from bilevel.testing.path_agreement import ROUGH

Document = Mapping[str, Any]
FLOOR = 1e-16
"""An error of zero, on a logarithmic scale."""
_ERROR = "‖h − dΦ/dx‖ / ‖dΦ/dx‖"


def compare_page(document: Document, figure: Path) -> str:
    """The page of compare.json: medians over seeds with lowest and highest, failures, the figure."""
    rows = document["rows"]
    kept = [
        column for column in _COMPARED if any(column[1](row) not in ("–", None) for row in rows)
    ]
    name, seeds = document["recipe"]["name"], document["seeds"]
    points = [point for each in document["points"].values() for point in each or ()]
    references = sorted({point["reference"] or "none" for point in points})
    dots = list(_dots_of_compare(document))
    return fill(
        "estimators.html.j2",
        [_dots(dots, "relative error at y*, a point a seed and a point of the run")]
        if dots
        else [],
        title=f"{name}: estimators compared",
        about=f"{_count(len(seeds), 'seed')}; reference: {', '.join(references) or 'none'}",
        made_by=document["command"],
        table=(
            ["estimator", "rank", *(head for head, _, _ in kept)],
            [(_name(row), [_rank(row), *(cell(row) for _, cell, _ in kept)]) for row in rows],
        ),
        meanings=[
            ("rank", "by err at y*, then by HVPs; what the reference cannot tell apart is equal"),
            *((head, meaning) for head, _, meaning in kept),
            *(
                [("smaller numbers", "from the lowest to the highest seed")]
                if any(row.get("spread") for row in rows)
                else []
            ),
            ("✓", "on the Pareto front of error and cost: no other is as good for less"),
        ],
        notes=document.get("notes", []),
        remarks=[(row["label"], reason) for row in rows for reason in row["failures"]],
        left_out=document["left_out"],
        texts=0,
        chart_title="Errors",
        figure=embedded([figure])[0] if figure.is_file() else None,
        recipe=to_yaml(document["recipe"]),
    )


def check_page(document: Document) -> str:
    """The page of what `check` found; with `--path`, of how estimators agree with the path."""
    rows = document["rows"]
    of_path = bool(rows) and "agreements" in rows[0]
    heads, cells, meanings = _agreements(rows) if of_path else _verdicts(rows)
    dots = [] if of_path else list(_dots_of_check(rows))
    what = "agreement with the lower path" if of_path else "estimators checked"
    references = dict.fromkeys(row["reference"] for row in rows if "reference" in row)
    about = "differences of F(x, y_K(x))" if of_path else f"reference: {', '.join(references)}"
    return fill(
        "estimators.html.j2",
        [_dots(dots, "relative error")] if dots else [],
        title=f"{document['recipe']}: {what}",
        about=about,
        made_by=document["command"],
        table=(heads, cells),
        meanings=meanings,
        notes=[],
        remarks=[(row["name"], row["note"]) for row in rows if row["note"]],
        left_out={},
        texts=0 if of_path else 1,
        chart_title="Errors",
        figure=None,
        recipe=to_yaml(document["content"]),
    )


def _name(row: Mapping[str, Any]) -> str:
    return row["label"] + ("*" if row["has_state"] else "") + (" ✓" if row["is_front"] else "")


def _rank(row: Mapping[str, Any]) -> Any:
    if row["failures"]:
        return Markup('<span class="bad">failed</span>')
    return str(row["rank"] or "–")


def _with_ends(key: str, scale: float, form: str) -> Callable[[Mapping[str, Any]], Any]:
    """A median, and below it the lowest and the highest of the seeds."""

    def cell(row: Mapping[str, Any]) -> Any:
        if row[key] is None:
            return "–"
        median = format(scale * row[key], form)
        ends = row.get("spread", {}).get(key)
        if not ends:
            return median
        span = " to ".join(format(scale * end, form) for end in ends)
        return Markup(f"{escape(median)}<br><small>{escape(span)}</small>")

    return cell


def _plain(key: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _or_dash(row[key], form)


def _megabytes(row: Mapping[str, Any]) -> str:
    return "–" if row["memory"] is None else significant(row["memory"] / 1e6, 2)


def _calls(row: Mapping[str, Any]) -> str:
    parts = [row["gradients"], row["hvps"], row["cross_products"]]
    return "–" if None in parts else counts(*parts)


_COMPARED: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...] = (
    ("err at y*", _with_ends("error", 1, ".1e"), f"{_ERROR}, lower level solved, along the run"),
    ("err at end", _plain("trained", ".1e"), "the same at the end of the recipe's run"),
    ("err warm", _plain("warm", ".1e"), "with the state of the point before; * where it matters"),
    ("cosine", _plain("cosine", ".3f"), "of the angle between h and dΦ/dx"),
    ("err in run", _with_ends("in_run", 1, ".1e"), "after the recipe's own lower solve"),
    ("ms", _with_ends("seconds", 1e3, ".3g"), "milliseconds of one estimate"),
    ("MB", _megabytes, "peak memory of one estimate"),
    (
        "grad/HVP/cross",
        _calls,
        "gradients, products with ∂²yy G and with (∂²xy G)ᵀ of one estimate",
    ),
    (
        "F at end",
        _with_ends("upper_loss", 1, ".4g"),
        "F(x, y*(x)) where a run with this estimator has spent the budget of oracle calls, on one batch a "
        "level: with minibatches a number of that batch, noise included",
    ),
)
"""(head, what stands below it, what it means)"""

Table = tuple[list[str], list[tuple[str, list[Any]]], list[tuple[str, str]]]


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = [
        "estimator",
        "differentiates",
        "claim err",
        "err vs dΦ/dx",
        "cosine",
        "HVPs",
        "verdict",
    ]
    cells = [
        (
            row["name"],
            [
                row["claim"] or "–",
                _or_dash(row["claim_error"], ".1e"),
                _or_dash(row["error"], ".1e"),
                _or_dash(row["cosine"], ".3f"),
                str(row["stats"]["hvps"]),
                Markup(f'<span class="{_TONE.get(row["verdict"], "")}">')
                + row["verdict"]
                + Markup("</span>"),
            ],
        )
        for row in rows
    ]
    meanings = [
        ("differentiates", "which function of x the estimator says that it differentiates"),
        ("claim err", "relative to the gradient of that function, all inner solves converged"),
        ("err vs dΦ/dx", f"{_ERROR} as configured, after the recipe's own lower solve"),
        ("cosine", "of the angle between h and dΦ/dx, as configured"),
        ("HVPs", "products with ∂²yy G of one estimate"),
        (
            "verdict",
            "exact (the solution's gradient), as claimed, wrong, approximate (claims nothing that "
            "could be tested), refused (cannot work here) or untested",
        ),
    ]
    return heads, cells, meanings


_TONE = {"exact": "good", "as claimed": "good", "wrong": "bad"}


def _agreements(rows: Sequence[Mapping[str, Any]]) -> Table:
    variables = list(dict.fromkeys(name for row in rows for name in row["agreements"]))

    def cell(found: Mapping[str, float] | None) -> str:
        if not found:
            return "–"
        mark = "?" if found["error"] > ROUGH else ""
        return f"{found['cosine']:.2f} × {found['ratio']:.2g}{mark}"

    cells = [
        (row["name"], [*(cell(row["agreements"].get(v)) for v in variables), cell(row["whole"])])
        for row in rows
    ]
    meanings = [
        (
            "each upper variable",
            "cosine of the slopes of h and of central differences of F(x, y_K(x)), K the recipe's "
            "own lower steps; × the ratio of their lengths; ? where the differences themselves change by more "
            "than a hundredth as their step is halved, and say no more than that",
        ),
        ("all", "over all variables together"),
    ]
    return ["estimator", *variables, "all"], cells, meanings


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _dots_of_compare(document: Document) -> Iterator[tuple[str, str, float]]:
    order = [row["label"] for row in document["rows"]]
    cells = sorted(document["cells"], key=lambda cell: order.index(cell["label"]))
    for cell in cells:
        along = cell.get("along") or ()
        for kind, key in (("at y*", "error"), ("in run", "error_in_run")):
            errors = [point[key] for point in along if point.get(key) is not None]
            if errors:
                yield cell["label"], kind, statistics.median(errors)


def _dots_of_check(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    for row in rows:
        for kind, key in (("claim err", "claim_error"), ("err vs dΦ/dx", "error")):
            if row[key] is not None:
                yield row["name"], kind, row[key]


def _dots(found: Sequence[tuple[str, str, float]], title: str) -> dict[str, Any]:
    """Errors on a logarithmic scale, a line an estimator, in the order in which they come."""
    rows = [{"name": n, "kind": k, "error": max(e, FLOOR), "is": e} for n, k, e in found]
    order = list(dict.fromkeys(name for name, _, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind, _ in found))
    legend = {"title": "", "orient": "top"}  # one for colour and shape, where the titles are equal
    axis = {"title": title, "format": ".0e", "tickCount": 6}
    return {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 55, "opacity": 0.85},
        "encoding": {
            "y": {
                "field": "name",
                "type": "nominal",
                "sort": order,
                "axis": {"title": None, "grid": True},
            },
            "x": {"field": "error", "type": "quantitative", "axis": axis, "scale": {"type": "log"}},
            "color": {"field": "kind", "type": "nominal", "sort": kinds, "legend": legend},
            "shape": {"field": "kind", "type": "nominal", "sort": kinds, "legend": legend},
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "estimator"},
                {"field": "kind", "type": "nominal"},
                {"field": "is", "type": "quantitative", "format": ".2e", "title": "error"},
            ],
        },
        "width": 1.5 * WIDTH,
        "height": {"step": 20},
        "config": {
            "view": {"stroke": None},
            "axis": {
                "gridColor": "#e8e8e8",
                "labelColor": "#555",
                "titleColor": "#555",
                "labelLimit": 260,
            },
        },
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
