"""YAML 1.2 with the line of every key, overrides `key.path=value`, and YAML again.

ruamel.yaml, because PyYAML reads `1e-3` as text and `no` as false, and accepts duplicate keys. A first
pass over YAML's own events (`yaml_limits`) refuses what would take unbounded time or memory.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import RoundTripRepresenter

from bilevel.components import Where, show
from bilevel.errors import RecipeError
from bilevel.recipe import yaml_limits
from bilevel.registry.diagnostics import Complaints, Origin

_AFTER_THE_FILE = 10**9
_LARGEST = 2**63


@dataclass(frozen=True)
class Source:
    """Plain data, and where each of its values was written."""

    title: str
    data: dict[str, Any]
    origins: dict[Where, Origin]

    def is_overridden(self, where: Where) -> bool:
        """Whether an override gave the value, and not the file."""
        origin = self.origins.get(where)
        return origin is not None and origin.order >= _AFTER_THE_FILE


def parse(text: str, title: str) -> Source:
    """Read a YAML mapping; `title` (the file's name) begins every complaint about it."""
    origins: dict[Where, Origin] = {}
    data = _load(text, title)
    if data is None:
        data = CommentedMap()
    if not isinstance(data, CommentedMap):
        raise RecipeError(f"{title}:1: must be a mapping of sections, got {_kind(data)}")
    return Source(title, _plain(data, title, origins), origins)


def override(source: Source, assignments: Iterable[str]) -> Source:
    """`source` with `key.path=value` applied in turn; values are YAML.

    Files that values name are relative to the current folder. A value replaces all that stood at its key. Options below a bare name keep the name:
    `estimator.damping=1` makes `{name: implicit, damping: 1}` of `estimator: implicit`.
    """
    data, origins = _copy(source.data), dict(source.origins)
    for order, assignment in enumerate(assignments):
        title = f"override {show(assignment)}"
        key, equals, text = assignment.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path) or len(path) > yaml_limits.DEPTH:
            raise RecipeError(f"{title}: must be key.path=value, e.g. upper.steps=200")
        value = _plain(_load(text, title), title, {})
        origin = Origin(title, _AFTER_THE_FILE + order, base=Path())
        where, made = _assign(data, path, value, title)
        for below in [known for known in origins if known[: len(where)] == where]:
            del origins[below]
        origins |= dict.fromkeys([where, *made], origin)
    return Source(source.title, data, origins)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order; `parse` reads it back to equal data."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 10**6
    yaml.allow_unicode = True
    out = io.StringIO()
    yaml.dump(_copy(data), out)
    return out.getvalue()


def _load(text: str, title: str) -> Any:
    try:
        yaml_limits.check(text)
        yaml = YAML(typ="rt", pure=True)
        yaml.Constructor = _Constructor
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{title}{line}: {_said(error)}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{title}:{line}: not valid YAML: the character {error.character!r} is not allowed"
        ) from None
    except YAMLError as error:
        raise RecipeError(f"{title}: {error}") from None


def _said(error: MarkedYAMLError) -> str:
    """ruamel's own words, without its page of advice."""
    problem = str(error.problem or error.context)
    if problem.startswith("found duplicate key"):
        return f"duplicate key {problem.split(chr(34))[1]!r}: each key may stand once"
    return f"not valid YAML: {problem}"


class _Constructor(RoundTripConstructor):
    """Gives a line to what Python's own parsers say of a number or a date: `2001-13-45`, 5,000 digits."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            problem = f"{show(node.value)} cannot be read: {error}; quote it if it is text"
            raise ConstructorError(None, None, problem, node.start_mark) from None


class _Representer(RoundTripRepresenter):
    """Writes `null` where ruamel would write nothing."""


_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _plain(value: Any, title: str, origins: dict[Where, Origin]) -> Any:
    """What ruamel read as plain data; the line of every key goes into `origins`."""
    complaints = Complaints(title, origins)

    def convert(value: Any, where: Where) -> Any:
        if isinstance(value, CommentedMap):
            converted = {key: inside(value, key, where) for key in value}
            return {check(key, where): item for key, item in converted.items()}
        if isinstance(value, CommentedSeq):
            return [inside(value, index, where) for index in range(len(value))]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and abs(value) >= _LARGEST:
            return complaints.add(
                where, "more than 63 bits; write 1e30 for a large number, quote what is text"
            )
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return complaints.add(where, f"{_kind(value)} has no use in a recipe; quote it")

    def inside(parent: Any, key: Any, where: Where) -> Any:
        where = (*where, key)
        position = parent.lc.data.get(key) if parent.lc.data else None
        if position is not None:
            origins[where] = Origin(f"{title}:{position[0] + 1}", position[0])
        return convert(parent[key], where)

    def check(key: Any, where: Where) -> Any:
        if not isinstance(key, str):
            complaints.add((*where, key), "keys must be text; quote it")
        return key

    plain = convert(value, ())
    complaints.finish()
    return plain


def _kind(value: Any) -> str:
    if isinstance(value, CommentedSeq):
        return "a list"
    return {"TaggedScalar": "a tagged value"}.get(type(value).__name__, f"a {type(value).__name__}")


def _assign(data: Any, path: Sequence[str], value: Any, title: str) -> tuple[Where, list[Where]]:
    """Put `value` at `path`; returns where that is, and the mappings made on the way."""
    where: Where = ()
    made: list[Where] = []
    for part in path[:-1]:
        key: Any = _index(data, part, title) if isinstance(data, list) else part
        where = (*where, key)
        below = data[key] if isinstance(data, list) else data.get(key)
        if isinstance(below, str):
            below = {"name": below}
        if not isinstance(below, (dict, list)):
            below = {}
            made.append(where)
        data[key] = below
        data = below
    last: Any = _index(data, path[-1], title) if isinstance(data, list) else path[-1]
    data[last] = value
    return (*where, last), made


def _index(data: list[Any], part: str, title: str) -> int:
    is_index = part.isascii() and part.isdecimal() and len(part) < 10
    if not is_index or int(part) >= len(data):
        raise RecipeError(f"{title}: {show(part)} must be an index below {len(data)} of a list")
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
