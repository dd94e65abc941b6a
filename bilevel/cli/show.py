"""`show`: what a component says of itself, read from source without torch; a recipe's text."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bilevel import recipe as recipes
from bilevel import registry
from bilevel.cli.docstrings import wrapped
from bilevel.cli.names import SUFFIXES, locate, shipped
from bilevel.errors import RecipeError
from bilevel.recipe import yaml_source
from bilevel.registry import presets
from bilevel.registry.presets import Preset
from bilevel.registry.source_docs import Option, Outline, outline_of


def show(console: Console, reference: str) -> None:
    """Print what a component says about itself, or the text of a recipe."""
    if reference.endswith(SUFFIXES):
        path = Path(reference) if Path(reference).is_file() else None
        path = path or locate(Path(reference).stem)
        text = path.read_text(encoding="utf-8").rstrip()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    group, _, name = reference.rpartition("/")
    found = [
        (each, entry)
        for each in ([group] if group else registry.groups())
        for entry in registry.entries(each)
        if entry.name == name
    ]
    is_recipe = not group and name in shipped()
    for each in [group] if group else registry.groups():
        if name in presets.of(each):
            _preset(console, each, presets.of(each)[name])
            return
    if group and registry.MODULE.match(name):
        found = [(group, registry.Entry(name, "", name))]
    if not found:
        _show_recipe_or_refuse(console, reference, name, is_recipe)
        return
    for index, (each, entry) in enumerate(found):
        if index:
            console.print()
        _component(console, each, entry)
    if is_recipe:
        hint = f"There is a recipe of this name too: bilevel show {name}.yaml"
        console.print(Text(f"\n{hint}", style="dim"))


def show_resolved(console: Console, reference: str) -> None:
    """Print a recipe with all defaults filled in."""
    recipe = recipes.load(locate(_without_suffix(reference)))
    console.print(recipe.dump().rstrip(), markup=False, highlight=False, soft_wrap=True)


def _without_suffix(reference: str) -> str:
    path = Path(reference)
    return reference if path.is_file() else reference.removesuffix(path.suffix)


def _show_recipe_or_refuse(console: Console, reference: str, name: str, is_recipe: bool) -> None:
    if is_recipe:
        show(console, f"{name}.yaml")
        return
    known = {n for group in registry.groups() for n in registry.names(group)} | set(shipped())
    known |= {n for group in registry.groups() for n in presets.of(group)}
    raise RecipeError(registry.unknown(reference, known, "component or recipe"))


def _preset(console: Console, group: str, preset: Preset) -> None:
    title = Text.assemble((preset.name, "bold cyan"), f"  {registry.kind(group)}, preset")
    console.print(title, soft_wrap=True)
    console.print()
    _print_doc(console, preset.about)
    text = yaml_source.to_yaml({registry.kind(group): dict(preset.spec)}).rstrip()
    console.print(Text(f"\n{text}"))
    console.print(Text(f"\nIts options: bilevel show {group}/{preset.spec['name']}", style="dim"))


def _component(console: Console, group: str, entry: registry.Entry) -> None:
    outline = outline_of(entry.reference)
    title = Text.assemble((entry.name, "bold cyan"), f"  {registry.kind(group)}  ")
    title.append(entry.reference, "dim")
    console.print(title, soft_wrap=True)
    if outline is None:
        console.print(Text("Its source is not in this installation."))
        return
    console.print()
    _print_doc(console, outline.doc or "(not documented)")
    if outline.module_doc:
        console.print()
        _print_doc(console, outline.module_doc, "dim")
    _options(console, outline)


def _print_doc(console: Console, doc: str, style: str = "", head: str = "") -> None:
    """A docstring as wide as the console; `head`, which it begins with, stands out."""
    text = Text("\n".join(wrapped(doc, console.width)), style)
    text.stylize("cyan", 0, len(head))
    console.print(text, soft_wrap=True)


def _options(console: Console, outline: Outline) -> None:
    if not outline.options:
        console.print(Text("\nNo options."))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("option", no_wrap=True, style="cyan")
    table.add_column("default")
    table.add_column("type")
    for option in outline.options:
        default = "(needed)" if option.default is None else _default(option)
        kind = option.type
        if option.slot is not None:
            kind = f"one of: bilevel ls {option.slot}"
            kind += " | None" if option.type.endswith("| None") else ""
        table.add_row(option.name, Text(default), Text(kind))
    console.print()
    console.print(table)
    for option in outline.options:
        if option.doc:
            console.print()
            _print_doc(console, f"{option.name}: {option.doc}", head=option.name)


def _default(option: Option) -> str:
    default = option.default or ""
    return default.removeprefix("lambda: ").removesuffix("()") if option.slot else default
