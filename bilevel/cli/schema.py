"""The JSON schema of recipes, put together from the fields of the components."""

from __future__ import annotations

import functools
import json
import operator
import typing
from types import NoneType
from typing import Any

import pydantic

from bilevel import registry
from bilevel.components import COMPONENT
from bilevel.errors import BilevelError
from bilevel.recipe.recipe import DEFAULTS, SECTIONS, VERSION, Checkpoint
from bilevel.registry import presets
from bilevel.registry.fields import (
    NOTHING,
    Field,
    describe,
    fields_of,
    group_of,
    open_annotation,
    plain,
)
from bilevel.registry.presets import Preset
from bilevel.registry.source_docs import outline_of
from bilevel.run.options import Evaluate, Runtime
from bilevel.run.upper import Upper

_GROUPS = {"problem": "problems", "lower": "lower", "estimator": "estimators"}
_OPTIONS = {"upper": Upper, "runtime": Runtime, "evaluate": Evaluate, "checkpoint": Checkpoint}

_SEEDS = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\.\d+)?\s*(,\s*\d+(\.\.\d+)?\s*)*$"},
    ]
}


def recipe_schema() -> str:
    """The schema as JSON text. Components that cannot be imported here are named only."""
    properties: dict[str, Any] = {
        "version": {"const": VERSION},
        "name": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0},
        "seeds": {
            "description": "A run a seed: 0..4 (both ends), or a list; in the place of `seed`.",
            "anyOf": [_SEEDS, {"type": "array", "items": _SEEDS, "minItems": 1}],
        },
        **{key: {"$ref": f"#/$defs/{group}"} for key, group in _GROUPS.items()},
        **{key: _component(cls, None) for key, cls in _OPTIONS.items()},
        "sinks": {
            "type": "array",
            "items": {"$ref": "#/$defs/sinks"},
            "default": DEFAULTS["sinks"],
        },
        "report": {"type": "boolean", "default": DEFAULTS["report"]},
    }
    assert properties.keys() == set(SECTIONS)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bilevel recipe",
        "type": "object",
        "properties": {key: properties[key] for key in SECTIONS},
        "required": ["problem"],
        "additionalProperties": False,
        "not": {"required": ["seed", "seeds"]},
        "$defs": {group: _group(group) for group in registry.groups()},
    }
    return json.dumps(schema, indent=2, ensure_ascii=False)


def _group(group: str) -> dict[str, Any]:
    names = list(registry.names(group))
    elsewhere = {"type": "string", "pattern": r":[A-Za-z_]\w*$"}
    unnamed = {"type": "object", "not": {"required": ["name"]}}
    foreign = {"type": "object", "properties": {"name": elsewhere}, "required": ["name"]}
    own = [_registered(group, name) for name in names]
    own += [_preset(group, preset) for preset in presets.of(group).values()]
    names += presets.of(group)
    return {"anyOf": [{"enum": names}, elsewhere, *own, foreign, unnamed]}


def _preset(group: str, preset: Preset) -> dict[str, Any]:
    """The options of the component it stands for; what it sets has a default now."""
    schema = _registered(group, preset.spec["name"])
    properties = {**schema["properties"], "name": {"const": preset.name}}
    required = [key for key in schema["required"] if key == "name" or key not in preset.spec]
    about = {"description": preset.about, "properties": properties, "required": required}
    return {**schema, **about}


def _registered(group: str, name: str) -> dict[str, Any]:
    try:
        return _component(registry.find(group, name), name)
    except BilevelError:
        pass
    except Exception:  # a plug-in may be broken in any way, which `doctor` tells
        if name not in registry.foreign(group):
            raise
    return {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}


def _component(cls: type[Any], name: str | None) -> dict[str, Any]:
    fields, is_open = fields_of(cls)
    outline = outline_of(f"{cls.__module__}:{cls.__qualname__}")
    docs = {option.name: option.doc for option in outline.options} if outline else {}
    properties = {
        key: {**_field(field), **({"description": docs[key]} if docs.get(key) else {})}
        for key, field in fields.items()
    }
    required = [key for key, field in fields.items() if field.required]
    if name is not None:
        properties = {"name": {"const": name}, **properties}
        required = ["name", *required]
    summary = (cls.__doc__ or "").partition("\n")[0]
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": required,
        "additionalProperties": is_open,
    }


def _field(field: Field) -> dict[str, Any]:
    group = group_of(field.annotation)
    if group is None:
        return _plain(field)
    inner, _ = open_annotation(field.annotation)
    schema: dict[str, Any] = {"$ref": f"#/$defs/{group}"}
    if typing.get_origin(inner) in (tuple, list):
        schema = {"type": "array", "items": schema}
    elif NoneType in typing.get_args(inner):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema if field.required else {**schema, "default": describe(field.default, group)}


def _plain(field: Field) -> dict[str, Any]:
    """What pydantic knows about a type; anything goes where it knows nothing."""
    if hasattr(field.annotation, "__pydantic_fields__"):
        return _component(field.annotation, None)
    members = typing.get_args(field.annotation)
    composed = [member for member in members if hasattr(member, "__pydantic_fields__")]
    kind = field.annotation
    if composed:
        kind = functools.reduce(operator.or_, (m for m in members if m not in composed))
    try:
        schema = pydantic.TypeAdapter(kind, config=COMPONENT).json_schema()
    except pydantic.PydanticUserError:  # also what pydantic has no JSON schema for
        return {}
    if composed:
        schema = {"anyOf": [schema, *(_component(member, None) for member in composed)]}
    default = plain(field.default)
    return schema if field.required or default is NOTHING else {**schema, "default": default}
