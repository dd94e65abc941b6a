"""Runs written by hand: a folder with a recipe and a record, in which nothing was computed."""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel import recipe as recipes
from bilevel.events import Evaluated, Event, Finished, Held, Started, Stepped, Totals, Warned
from bilevel.recipe import yaml_source
from bilevel.runfolder import RunFolder
from bilevel.sinks.jsonl import JSONLines
from bilevel.types import LowerStats, Stats

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000a49444154789c6300010000050001"
)


@functools.cache
def _content(estimator: str) -> dict[str, Any]:
    return dict(recipes.loads(f"problem: quadratic\nestimator: {estimator}\n").content)


def write(
    runs: Path,
    run: str,
    losses: Sequence[float],
    *,
    seed: int = 0,
    estimator: str = "implicit",
    calls: int = 10,
    measures: Mapping[str, Sequence[float]] | None = None,
    held: Mapping[str, float] | None = None,
    warned: str = "",
    end: str | None = "done",
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> RunFolder:
    """runs/<run> with an upper loss a step, each of `calls` gradients; measures are (first, last)."""
    folder = RunFolder(runs / run)
    folder.path.mkdir(parents=True)
    content = copy.deepcopy(_content(estimator)) | {"seed": seed, "name": folder.path.parent.name}
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        functools.reduce(lambda at, part: at[part], parents, content)[last] = value
    folder.resolved.write_text(yaml_source.to_yaml(content))
    text = json.dumps({"hash": "0" * 64, "packages": {}, **(about or {})})
    (folder.path / "environment.json").write_text(text)
    lower, stats, steps = LowerStats(3, 3, -0.5, 0.1), Stats(hvps=2), len(losses)
    events: list[Event] = [Started(0, steps, content["name"], 3, 4, "cpu", "float64")]
    measured = measures or {}
    if measured:
        events.append(Evaluated(0, {name: values[0] for name, values in measured.items()}))
    for step, loss in enumerate(losses, 1):
        totals = Totals(gradients=calls * step)
        events.append(Stepped(step, loss, loss / 2, 0.25, lower, stats, totals, 0.5))
    if warned:
        events.append(Warned(steps, "kind", warned))
    if measured:
        events.append(Evaluated(steps, {name: values[-1] for name, values in measured.items()}))
    if held:
        events.append(Held(steps, held))
    if end:
        events.append(Finished(steps, end, 1.0))
    receiver = JSONLines().open(folder.path, None)
    for event in events:
        receiver.receive(event)
    receiver.close()
    return folder


def table(html: str, name: str) -> dict[str, list[str]]:
    """The rows of a table of a page by their heads: `{"arm": heads, "unroll": cells, …}`."""
    from html.parser import HTMLParser

    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[str]] = []
            self.inside = self.in_cell = False

        def handle_starttag(self, tag, attrs):
            if tag == "div" and dict(attrs).get("aria-label") == name:
                self.inside = True
            if self.inside and tag == "tr":
                self.rows.append([])
            if self.inside and tag in ("th", "td"):
                self.in_cell = True
                self.rows[-1].append("")
            elif self.in_cell and tag == "br":
                self.rows[-1][-1] += " "

        def handle_endtag(self, tag):
            self.in_cell = self.in_cell and tag not in ("th", "td")
            self.inside = self.inside and tag != "table"

        def handle_data(self, data):
            if self.in_cell:
                self.rows[-1][-1] += data

    parser = Cells()
    parser.feed(html)
    return {row[0]: row[1:] for row in parser.rows}
