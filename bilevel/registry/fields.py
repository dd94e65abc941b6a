"""What a component's class takes, and what an instance was made of, as plain data.

The one place that knows how pydantic components, standard dataclasses and plain classes differ.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bilevel import registry
from bilevel.components import Slot

NOTHING = object()
"""Stands for a value that is not plain data."""


@dataclass(frozen=True)
class Field:
    """A parameter of a component's class."""

    annotation: Any
    required: bool
    default: Any = None


def describe(value: Any, group: str) -> Any:
    """The plain data that builds `value` again, all its options filled in."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [describe(item, group) for item in value]
    if isinstance(value, Mapping):
        return {key: describe(item, group) for key, item in value.items()}
    fields, _ = fields_of(type(value))
    name = registry.name_of(type(value), group)
    return {"name": name, **content_of(value, fields, {})}


def fields_of(cls: type[Any]) -> tuple[dict[str, Field], bool]:
    """The parameters of a class, and whether it takes any others (`**options`)."""
    infos = getattr(cls, "__pydantic_fields__", None)
    if infos is not None:
        return {name: _pydantic_field(info) for name, info in infos.items()}, False
    made: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        made = {
            field.name: field.default_factory()
            for field in dataclasses.fields(cls)
            if field.default_factory is not dataclasses.MISSING
        }
    hints = _hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    fields, is_open = {}, False
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            required = parameter.default is inspect.Parameter.empty
            default = None if required else made.get(name, parameter.default)
            fields[name] = Field(hints.get(name, Any), required, default)
    return fields, is_open


def _pydantic_field(info: Any) -> Field:
    marks = tuple(info.metadata)
    annotation = Annotated[(info.annotation, *marks)] if marks else info.annotation
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    return Field(annotation, info.is_required(), default)


def _hints(owner: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that exist for a type checker only


def content_of(
    instance: Any, fields: Mapping[str, Field], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of an instance as plain data; those in `given` are known, the rest is read."""
    content = {}
    for key, field in fields.items():
        if key in given:
            content[key] = given[key]
            continue
        is_read = readable(type(instance))
        value = getattr(instance, key, field.default) if is_read else field.default
        group = group_of(field.annotation)
        data = describe(value, group) if group else plain(value)
        if data is not NOTHING:
            content[key] = data
    return {**content, **{key: value for key, value in given.items() if key not in fields}}


def readable(cls: type[Any]) -> bool:
    """Whether instances keep their options under the names they were given by."""
    return dataclasses.is_dataclass(cls) or hasattr(cls, "__pydantic_fields__")


def plain(value: Any) -> Any:
    """A value as YAML can hold it, `NOTHING` where it cannot."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        items = [plain(item) for item in value]
        return NOTHING if any(item is NOTHING for item in items) else items
    if isinstance(value, Mapping):
        entries = {str(key): plain(item) for key, item in value.items()}
        return NOTHING if any(e is NOTHING for e in entries.values()) else entries
    if hasattr(type(value), "__pydantic_fields__"):
        return content_of(value, fields_of(type(value))[0], {})
    return NOTHING


def open_annotation(annotation: Any) -> tuple[Any, Slot | None]:
    if typing.get_origin(annotation) is not Annotated:
        return annotation, None
    inner, *marks = typing.get_args(annotation)
    return inner, next((mark for mark in marks if isinstance(mark, Slot)), None)


def group_of(annotation: Any) -> str | None:
    """The group of the slot anywhere in an annotation."""
    inner, slot = open_annotation(annotation)
    if slot is not None:
        return slot.group
    found = (group_of(argument) for argument in typing.get_args(inner))
    return next((group for group in found if group is not None), None)
