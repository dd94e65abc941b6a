"""Components from plain data: a name and options, nested to any depth, checked as a whole.

A field annotated with `Slot("linear")` takes a component of that group: a bare name, a mapping
with `name` and options, or options alone, which then change the field's default component. One
annotated with a component's class itself takes that class's options, with no name.
pydantic components, standard dataclasses and plain classes are all built the same way.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar

import pydantic

from bilevel import registry
from bilevel.components import COMPONENT, Slot, named, show
from bilevel.errors import BilevelError, RecipeError, RequirementError
from bilevel.registry import presets
from bilevel.registry.diagnostics import Complaints, Where
from bilevel.registry.fields import (
    Field,
    content_of,
    describe,
    fields_of,
    open_annotation,
    readable,
)

C = TypeVar("C")
LONGEST_NAME = 1000
"""Characters of a name, one with the path of a file included."""


@dataclass(frozen=True)
class Built:
    """A value with the plain data that builds it again, all defaults filled in."""

    value: Any
    content: Any
    composed: bool = False
    """Whether a component is in it, so that `content` cannot be read back from `value`."""


def build(group: str, spec: Any, where: str = "", base: Path | None = None) -> Any:
    """The component that `spec` describes: a name, or a mapping of `name` and options.

    Raises `RecipeError` with everything that is wrong, each at its place below `where`.
    """
    complaints = Complaints()
    built = Builder(complaints, base).component(group, spec, (where,) if where else ())
    complaints.finish()
    assert built is not None
    return built.value


def resolve(group: str, given: Any, where: str) -> Any:
    """The component that a caller means: an instance as it is, one made of a name or a mapping.

    Raises `RecipeError` for an unknown name or option, and for what is not a component: a class
    (an instance is asked for), a number, None.
    """
    if isinstance(given, (str, Mapping)):
        return build(group, given, where)
    if isinstance(given, type):
        raise RecipeError(_class_given(where, given))
    lacking, cls = [], type(given)
    for name in DOES.get(group, ()):
        if not (hasattr(cls, name) or hasattr(given, name)):  # a property is not asked
            lacking.append(name)
    if lacking and lacking[0] != DOES[group][0]:
        raise RecipeError(
            f"{where} = {show(given)}; {type(given).__name__} is none of {group} "
            f"(`bilevel ls {group}`): it lacks {', '.join(lacking)}"
        )
    if lacking:
        known = ", ".join(registry.names(group))
        raise RecipeError(
            f"{where} = {show(given)}; expected an instance, a name ({known}), or a mapping with a "
            "name and options"
        )
    return given


def made(cls: type[C], given: Any, where: str) -> C:
    """What a caller means by options of `cls`: an instance as it is, one made of a mapping.

    Raises `RecipeError` with everything that is wrong, each at its place below `where`.
    """
    if isinstance(given, cls):
        return given
    if isinstance(given, type):
        raise RecipeError(_class_given(where, given))
    complaints = Complaints()
    built = Builder(complaints).options(cls, given, (where,))
    complaints.finish()
    assert built is not None
    return built.value


def _class_given(where: str, cls: type[Any]) -> str:
    return f"{where} = {cls.__name__}, a class; expected an instance: {cls.__name__}(…)"


DOES = {
    "estimators": ("estimate", "init", "needs"),
    "lower": ("solve", "init", "offers"),
    "linear": ("solve",),
    "optimizers": ("step", "init"),
}
"""What a component of a group is known by, and has besides; what a problem lacks, a run says."""


class Builder:
    """Builds components and collects complaints; methods return None after complaining."""

    def __init__(self, complaints: Complaints, base: Path | None = None) -> None:
        self._complaints = complaints
        self._base = base or Path()

    def component(self, group: str, spec: Any, where: Where, default: Any = None) -> Built | None:
        """The component of `group` that `spec` describes, `default` where it has no name."""
        is_bare = isinstance(spec, str)
        if is_bare:
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            known = ", ".join(registry.names(group))
            self._complaints.add(
                where, f"must be a name or a mapping with a name; known: {known}", spec
            )
            return None
        if "name" not in spec:
            if default is None:
                known = ", ".join(registry.names(group))
                self._complaints.add(where, f"has no name; known {group}: {known}")
                return None
            spec = _merge(describe(default, group), spec)
        preset = presets.of(group).get(spec["name"]) if isinstance(spec["name"], str) else None
        if preset:
            own = {key: value for key, value in spec.items() if key != "name"}
            spec = _merge(preset.spec, own)
        options = dict(spec)
        name = options.pop("name")
        at = where if is_bare else (*where, "name")
        cls = self._find(group, name, at)
        if cls is None:
            return None
        built = self.options(cls, options, where)
        if built is None:
            return None
        name = registry.absolute(name, self._base_at(at))
        return Built(built.value, {"name": name, **built.content}, composed=True)

    def options(self, cls: type[Any], spec: Any, where: Where) -> Built | None:
        """An instance of `cls` with the options of `spec`."""
        if not isinstance(spec, Mapping):
            self._complaints.add(where, "must be a mapping of options", spec)
            return None
        try:
            fields, is_open = fields_of(cls)
        except (ValueError, TypeError) as error:  # a builtin type, whose signature is not written
            self._complaints.add(where, f"{cls.__name__} is not a component: {error}")
            return None
        parts: dict[str, Built] = {}
        failed: set[str] = set()
        for key, given in spec.items():
            if key not in fields and not is_open:
                handed_on = f" What is handed on goes below options: {{{key}: …}}"
                remedy = handed_on if "options" in fields else ""
                self._complaints.add_unknown_key((*where, key), list(fields), remedy)
                failed.add(key)
                continue
            field = fields.get(key, Field(Any, required=False))
            part = self._value(field.annotation, given, (*where, key), field.default)
            if part is None:
                failed.add(key)
            else:
                parts[key] = part
        for key, field in fields.items():
            if field.required and key not in spec:
                self._complaints.add((*where, key), f"missing; {cls.__name__} needs it")
                failed.add(key)
        instance = self._instance(cls, fields, parts, where, failed)
        if instance is None:
            return None
        given = {k: p.content for k, p in parts.items() if p.composed or not readable(cls)}
        return Built(instance, content_of(instance, fields, given), composed=True)

    def _find(self, group: str, name: Any, where: Where) -> type[Any] | None:
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            self._complaints.add(where, "must be a name", name)
            return None
        try:
            return registry.find(group, name, self._base_at(where))
        except RecipeError as error:
            self._complaints.add(where, f"{error}{self._elsewhere(name, where)}")
            return None

    def _base_at(self, where: Where) -> Path:
        base = self._complaints.base(where)
        return self._base if base is None else base

    def _elsewhere(self, name: str, where: Where) -> str:
        """A hint where the command line names a file that lies beside the recipe."""
        match = registry.FILE.match(name)
        if not match or self._base_at(where) == self._base:
            return ""
        here, beside = (base / match["file"] for base in (self._base_at(where), self._base))
        try:
            if here.exists() or not beside.exists():
                return ""
        except OSError:  # a name that no file can have
            return ""
        return f", the current folder being where overrides look; there is {beside}"

    def _instance(
        self,
        cls: type[Any],
        fields: Mapping[str, Field],
        parts: Mapping[str, Built],
        where: Where,
        failed: set[str],
    ) -> Any:
        values = {key: part.value for key, part in parts.items()}
        is_pydantic = hasattr(cls, "__pydantic_validator__")
        if not is_pydantic:
            for key in values.keys() & fields.keys():
                if not self.fits(fields[key].annotation, values[key], (*where, key)):
                    failed.add(key)
            if failed:
                return None
        try:
            instance = cls(**values)
        except RequirementError:
            raise
        except Exception as error:
            # a component says it in the words of Python
            found = error.__context__ if is_pydantic and type(error) is RecipeError else error
            if isinstance(found, pydantic.ValidationError):
                self._complaints.add_validation(found, where, values, failed)
                return None
            if not failed:
                kind = "" if isinstance(error, BilevelError) else f"{type(error).__name__}: "
                self._complaints.add(where, f"{cls.__name__} refused its options: {kind}{error}")
            return None
        return None if failed else instance

    def fits(self, annotation: Any, value: Any, where: Where) -> bool:
        """Whether a value is of the type that an annotation asks for."""
        try:
            adapter = pydantic.TypeAdapter(annotation, config=COMPONENT)
        except (pydantic.PydanticUserError, pydantic.PydanticSchemaGenerationError):
            return True  # a type that pydantic cannot check, or that brings its own settings
        try:
            adapter.validate_python(value)
        except pydantic.ValidationError as error:
            self._complaints.add_validation(error, where, value)
            return False
        return True

    def _value(self, annotation: Any, given: Any, where: Where, default: Any) -> Built | None:
        inner, slot = open_annotation(annotation)
        if given is None and _allows_none(inner):
            return Built(None, None)
        members = [a for a in _members(inner) if a is not NoneType]
        for member in members:
            member, own = open_annotation(member)
            marks = own or slot
            group = marks.group if marks else None
            origin, arguments = typing.get_origin(member), typing.get_args(member)
            if origin in (tuple, list, set, frozenset) and isinstance(given, (list, tuple)):
                return self._items(origin, arguments, given, where, group)
            if origin is dict and isinstance(given, Mapping) and len(arguments) == 2:
                return self._entries(arguments[1], given, where)
            if group is not None:
                return self.component(group, given, where, default)
            if isinstance(given, Mapping) and hasattr(member, "__pydantic_fields__"):
                return self.options(member, given, where)
            if member is Path and isinstance(given, str):
                return self._path(given, where)
        return Built(given, given)

    def _path(self, given: str, where: Where) -> Built | None:
        try:
            return Built(Path(named(given)), given)
        except ValueError as error:
            self._complaints.add(where, str(error), given)
            return None

    def _items(
        self, origin: Any, arguments: Any, given: Any, where: Where, group: str | None
    ) -> Built | None:
        each = list(arguments) or [Any]
        if origin is tuple and len(each) == len(given) and each[-1] is not Ellipsis:
            kinds = each
        else:
            kinds = [each[0]] * len(given)
        if group is not None:
            kinds = [Annotated[kind, Slot(group)] for kind in kinds]
        built = [
            self._value(kind, item, (*where, index), None)
            for index, (kind, item) in enumerate(zip(kinds, given, strict=True))
        ]
        good = [part for part in built if part is not None]
        if len(good) < len(built):
            return None
        composed = any(part.composed for part in good)
        return Built(origin(part.value for part in good), [p.content for p in good], composed)

    def _entries(self, annotation: Any, given: Any, where: Where) -> Built | None:
        built = {k: self._value(annotation, v, (*where, k), None) for k, v in given.items()}
        good = {key: part for key, part in built.items() if part is not None}
        if len(good) < len(built):
            return None
        composed = any(part.composed for part in good.values())
        values = {key: part.value for key, part in good.items()}
        return Built(values, {key: part.content for key, part in good.items()}, composed)


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _allows_none(annotation: Any) -> bool:
    return any(member in (None, NoneType) for member in _members(annotation))


def _merge(default: Any, given: Any) -> Any:
    """`given` over `default`, as deep as mappings go; a mapping with another name stands alone."""
    if not isinstance(default, Mapping) or not isinstance(given, Mapping):
        return given
    if given.get("name", default.get("name")) != default.get("name"):
        return given
    merged = {**default}
    for key, value in given.items():
        merged[key] = _merge(default.get(key), value)
    return merged
