"""`ls`: what there is, with a line on each; read from source, imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bilevel import registry
from bilevel.cli.answer import JSONAnswer
from bilevel.cli.names import shipped, summary
from bilevel.errors import RecipeError
from bilevel.registry import presets

_PRESETS = ", presets"


def list_all(console: Console, kind: str | None, answer: JSONAnswer | None = None) -> None:
    """Print one kind of thing with a line on each, or the names of every kind.

    An `answer` has {"kinds": {kind: [{"name", "summary", "preset"}]}}.
    """
    kinds = (*registry.groups(), "recipes")
    if kind is not None and kind not in kinds:
        raise RecipeError(registry.unknown(kind, kinds, "kind of component"))
    asked = [each for each in kinds if kind in (None, each)]
    if answer:
        answer.data["kinds"] = {
            each: [
                {"name": name, "summary": text, "preset": part != each}
                for part in (each, f"{each}{_PRESETS}")
                for name, text in _rows(part)
            ]
            for each in asked
        }
        return
    asked = [part for each in asked for part in (each, f"{each}{_PRESETS}")]
    if kind is None:
        _names_only(console, {each: names for each in asked if (names := _names(each))})
        return
    tables = [(each, rows) for each in asked if (rows := _rows(each))]
    width = max((len(name) for _, rows in tables for name, _ in rows), default=0)
    for index, (each, rows) in enumerate(tables):
        if index:
            console.print()
        console.print(Text(each, style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="cyan", min_width=width)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        console.print(Padding(table, (0, 0, 0, 2)))


def _names_only(console: Console, tables: Mapping[str, Sequence[str]]) -> None:
    width = max(len(each) for each in tables)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold", min_width=width)
    table.add_column(style="cyan")
    for each, names in tables.items():
        table.add_row(Text(each), Text(", ".join(names)))
    console.print(table)
    hint = "\nWhat each is: bilevel ls estimators. All about one: bilevel show implicit"
    console.print(Text(hint, style="dim"))


def _names(kind: str) -> Sequence[str]:
    if kind == "recipes":
        return sorted(shipped())
    if kind.endswith(_PRESETS):
        return [preset.name for preset in presets.of(kind.removesuffix(_PRESETS)).values()]
    return registry.names(kind)


def _rows(kind: str) -> list[tuple[str, str]]:
    if kind == "recipes":
        return [(name, summary(path)) for name, path in sorted(shipped().items())]
    if kind.endswith(_PRESETS):
        group = kind.removesuffix(_PRESETS)
        return [(preset.name, preset.about) for preset in presets.of(group).values()]
    return [(entry.name, entry.summary) for entry in registry.entries(kind)]
