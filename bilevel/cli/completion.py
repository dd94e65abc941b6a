"""What a shell completes: recipes, components, keys and values of overrides, runs. Imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from bilevel import registry
from bilevel.cli.names import locate, shipped, summary
from bilevel.errors import BilevelError
from bilevel.registry import presets
from bilevel.registry.source_docs import Option, outline_of

Found = list[tuple[str, str]]
"""What may be typed, each with what it means."""

_SLOTS = {"problem": "problems", "lower": "lower", "estimator": "estimators", "sinks": "sinks"}
_CLASSES = {
    "upper": "bilevel.run.upper:Upper",
    "runtime": "bilevel.run.options:Runtime",
    "evaluate": "bilevel.run.options:Evaluate",
    "checkpoint": "bilevel.recipe.recipe:Checkpoint",
}
_DEFAULTS = {"lower": "gradient", "estimator": "implicit"}
_PLAIN = ("version", "name", "seed", "seeds", "report")
_LITERAL = re.compile(r"Literal(\[[^]]*\])")


def complete_recipe(incomplete: str) -> Found:
    """Shipped recipes whose name begins so, and files of the folder."""
    named = [(name, summary(path)) for name, path in shipped().items()]
    return [*_beginning(named, incomplete), *_files(incomplete)]


def complete_name(incomplete: str) -> Found:
    """Components, also as `group/name`, presets and recipes whose name begins so."""
    found: Found = []
    for group in registry.groups():
        for name, text in _components(group):
            found += [(name, text), (f"{group}/{name}", text)]
    found += [(f"{name}.yaml", summary(path)) for name, path in shipped().items()]
    groups = incomplete.partition("/")[1]  # only who has typed one is shown them
    return [pair for pair in _beginning(found, incomplete) if groups or "/" not in pair[0]]


def complete_kind(incomplete: str) -> Found:
    """What `ls` lists."""
    kinds = [(group, registry.kind(group)) for group in registry.groups()]
    return _beginning([*kinds, ("recipes", "shipped recipes")], incomplete)


def complete_estimators(incomplete: str) -> Found:
    """A list of estimators, of which the last is typed."""
    before, comma, last = incomplete.rpartition(",")
    taken = {*before.split(",")}
    found = [pair for pair in _components("estimators") if pair[0] not in taken]
    return [(f"{before}{comma}{name}", text) for name, text in _beginning(found, last)]


def complete_run(ctx: typer.Context, incomplete: str) -> Found:
    """Names of runs below the folder of runs, and the runs of a name that is typed in full."""
    from bilevel.runfolder.folder import summaries

    try:
        found = summaries(Path(ctx.params.get("runs_dir") or "runs"))
    except BilevelError:
        return []
    newest: dict[str, str] = {}
    for each in found:
        newest[each.name] = f"newest of its name, {each.status}"
        newest[str(each.folder.path)] = f"{each.status} {each.step}/{each.steps}"
    pairs = [(name, text) for name, text in newest.items() if "/" in incomplete or "/" not in name]
    return _beginning(pairs, incomplete)


def complete_override(ctx: typer.Context, incomplete: str) -> Found:
    """Keys of the recipe and of its components, `estimator.solver.`; after "=" the values.

    Bash takes "=" for the end of a word, so that the key is then among the words before.
    """
    words: list[str] = list(ctx.params.get("overrides") or ())
    data = _recipe(ctx.params.get("recipe"), words)
    if incomplete == "=" or words[-1:] == ["="]:
        key = words[-1] if incomplete == "=" else words[-2] if len(words) > 1 else ""
        return _beginning(_values(key, data), "" if incomplete == "=" else incomplete)
    key, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{key}={name}", text) for name, text in _beginning(_values(key, data), value)]
    before, dot, _ = key.rpartition(".")
    return [
        (f"{before}{dot}{name}", text)
        for name, text in _keys(before.split(".") if dot else [], data)
        if f"{before}{dot}{name}".startswith(incomplete)
    ]


def _recipe(reference: str | None, overrides: list[str]) -> Mapping[str, Any]:
    """The data of a recipe with the overrides that are typed already; none where it has a mistake."""
    from bilevel.recipe.yaml_source import override, parse

    try:
        source = parse(locate(reference or "").read_text(encoding="utf-8"), reference or "")
    except (BilevelError, OSError, UnicodeDecodeError):
        return {}
    try:
        return override(source, [word for word in overrides if "=" in word[1:]]).data
    except BilevelError:
        return source.data


def _keys(path: list[str], data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not path:
        for section in (*_SLOTS, *_CLASSES, *_PLAIN):
            yield f"{section}=" if section in (*_SLOTS, *_PLAIN) else f"{section}.", ""
            if section in _SLOTS and section != "sinks":
                yield f"{section}.", "its options"
        return
    for option in _options(path, data):
        yield f"{option.name}=", option.doc
        if option.slot:
            yield f"{option.name}.", f"options of the {option.name}"


def _values(key: str, data: Mapping[str, Any]) -> Found:
    *path, last = key.split(".")
    if not path:
        kinds = {"report": [("true", ""), ("false", "")]}
        return _components(_SLOTS[last]) if last in _SLOTS else kinds.get(last, [])
    for option in _options(path, data):
        if option.name == last:
            return _values_of(option)
    return []


def _values_of(option: Option) -> Found:
    if option.slot:
        return _components(option.slot)
    if option.type == "bool":
        return [("true", ""), ("false", "")]
    literal = _LITERAL.search(option.type)
    return [(str(value), option.doc) for value in ast.literal_eval(literal[1])] if literal else []


def _options(path: list[str], data: Any) -> tuple[Option, ...]:
    """The options at a path, followed through what the recipe names there, or the default does."""
    first, *rest = path
    data = data.get(first)
    group = _SLOTS.get(first)
    options = _outline(_CLASSES[first]) if first in _CLASSES else _of(group, data, first)
    for part in rest:
        option = next((option for option in options if option.name == part), None)
        if option is None or not option.slot:
            return ()
        data = data.get(part) if isinstance(data, Mapping) else None
        options = _of(option.slot, data, _by_class(option.slot, option.default or ""))
    return options


def _of(group: str | None, spec: Any, default: str) -> tuple[Option, ...]:
    """The options of the component that a recipe names, else of the default."""
    if group is None:
        return ()
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    name = name if isinstance(name, str) else _DEFAULTS.get(default, default)
    preset = presets.of(group).get(name)
    reference = registry.references(group).get(preset.spec["name"] if preset else name)
    return _outline(reference) if reference else ()


def _by_class(group: str, default: str) -> str:
    """The name of the component whose class a default calls: `CG()` is cg."""
    called = re.match(r"\w+", default)
    found = registry.references(group).items()
    names = (name for name, ref in found if called and ref.endswith(f":{called[0]}"))
    return next(names, "")


def _outline(reference: str) -> tuple[Option, ...]:
    try:
        outline = outline_of(reference)
    except BilevelError:
        return ()
    return outline.options if outline else ()


def _components(group: str) -> Found:
    entries = [(entry.name, entry.summary) for entry in registry.entries(group)]
    return [*entries, *((preset.name, preset.about) for preset in presets.of(group).values())]


def _files(incomplete: str) -> Found:
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    found = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    return _beginning([(str(path), "") for path in sorted(found)], incomplete.removeprefix("./"))


def _beginning(pairs: Found, incomplete: str) -> Found:
    return [pair for pair in pairs if pair[0].startswith(incomplete)]
