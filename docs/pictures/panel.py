"""The panel of a run in a terminal of 80 and of 60 columns, as `bilevel run` draws it.

The run is real; what differs from one machine to another, the time left and the memory, is a
constant.
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from bilevel import recipe
from bilevel.events import Event, Started, Stepped, Totals, Warned
from bilevel.recipe.assemble import assemble
from bilevel.run.engine import run, start
from bilevel.sinks import panel
from bilevel.types import LowerStats, Stats
from docs.pictures.gallery import RECIPES
from docs.pictures.keep import Picture

WIDTHS = (80, 60)
OVERRIDES = ["runtime.device=cpu", "upper.steps=120", "estimator.solver.iterations=4"]
AT = 80
"""The step at which the panel is looked at."""
LEFT, MEMORY = "2.1s", "0.4 GB"
NUMBERS = ("step", "upper_loss", "lower_loss", "hypergradient_norm")
EVIDENCE = ("residual", "condition", "curvature")
"""What the panel shows of a step."""
LIGHT = TerminalTheme(
    (255, 255, 255),
    (34, 34, 34),
    [
        (0, 0, 0),
        (180, 30, 30),
        (30, 120, 30),
        (140, 95, 0),
        (40, 80, 180),
        (130, 40, 130),
        (0, 110, 120),
        (90, 90, 90),
    ],
)
DARK = TerminalTheme(
    (24, 26, 31),
    (220, 220, 220),
    [
        (0, 0, 0),
        (255, 120, 110),
        (120, 210, 120),
        (230, 190, 80),
        (130, 170, 255),
        (220, 140, 220),
        (100, 210, 220),
        (160, 160, 160),
    ],
)
FORMAT = """<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">
<title>TITLE</title>
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px }}
{styles}
</style>
<rect class="paper" width="{width}" height="{height}" rx="6"/>
<g transform="translate({terminal_x}, 12)"><g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""
"""Without the fonts that rich would ask the network for."""


@cache
def compute() -> list[dict[str, Any]]:
    """The events of the run until the panel is looked at."""
    setup = assemble(recipe.load(RECIPES / "quadratic.yaml", OVERRIDES))
    seen = []
    for event in run(setup, start(setup)):
        if isinstance(event, (Started, Warned)):
            seen.append({"event": type(event).__name__, **asdict(event)})
        elif isinstance(event, Stepped):
            numbers = {name: getattr(event, name) for name in NUMBERS}
            evidence = {name: getattr(event.estimate, name) for name in EVIDENCE}
            parts = {"estimate": evidence, "totals": asdict(event.totals)}
            seen.append({"event": "Stepped", **numbers, **parts})
            if event.step == AT:
                break
    return seen


def _event(said: dict[str, Any]) -> Event:
    said = dict(said)
    kind = said.pop("event")
    if kind != "Stepped":
        return Started(**said) if kind == "Started" else Warned(**said)
    estimate, totals = Stats(**said.pop("estimate")), Totals(**said.pop("totals"))
    lower = LowerStats(0, 0, 0.0, 0.0)  # which the panel does not show
    return Stepped(**said, lower=lower, estimate=estimate, totals=totals, seconds=0.0)


def draw(title: str, width: int, data: list[dict[str, Any]]) -> str:
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    shown = panel.Panel(console)
    for said in data:
        shown.takes(_event(said))
    with patch.object(panel, "peak_memory", lambda: MEMORY), patch.object(shown, "_left", LEFT):
        console.print(shown.drawn())
    export = partial(console.export_svg, unique_id="panel", clear=False, code_format=FORMAT)
    light, dark = export(theme=LIGHT), export(theme=DARK)
    rules = "\n".join(re.findall(r"^\s*(\.panel-r\d+ .*)$", dark, re.MULTILINE))
    both = f".paper {{fill: #f4f4f4}}\n@media (prefers-color-scheme: dark) {{\n.paper {{fill: #181a1f}}\n{rules}\n}}\n</style>"
    return light.replace("</style>", both).replace("TITLE", title)


def _picture(width: int) -> Picture:
    title = f"The panel of a run in a terminal of {width} columns"
    return Picture(title, compute, partial(draw, title, width))


PICTURES = {f"panel_{width}": _picture(width) for width in WIDTHS}
