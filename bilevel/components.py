"""What makes a class a component: frozen, keyword-only, validated alike from YAML and from Python."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from bilevel.errors import BilevelError, unknown

COMPONENT = ConfigDict(
    extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
)

C = TypeVar("C")


def named(path: Any) -> Any:
    """A path that is given; raises `ValueError` for an empty one, which would be the current folder."""
    if path == "":
        raise ValueError("must name a file or a folder (. is the current folder)")
    return path


PathName = Annotated[str, AfterValidator(named)]
"""A file or a folder, and not nothing."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def component(cls: type[C]) -> type[C]:
    """Make a class a component: frozen, keyword-only, validated alike from YAML and Python.

    The fields of a component are at once its recipe schema, its documentation and its
    defaults. Options of a wrong type or value raise `pydantic.ValidationError`, which the recipe
    loader turns into a `RecipeError` with the line; an unknown one, one given by position, and a
    tensor given as a number raise `TypeError`.
    """
    decorate = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=COMPONENT)
    made = cast("type[C]", decorate(cls))
    made.__new__ = _by_name_only(made)
    return made


def _by_name_only(made: type[Any]) -> Any:
    """A `__new__` that refuses options by position.

    Pydantic's dataclass takes a field declared with `Field(...)` by position whatever `kw_only`
    says, and writes `__init__` again when it resolves a forward reference; `__new__` it leaves.
    """
    create = cast("Callable[..., Any]", made.__new__)

    def __new__(cls: type[Any], *args: Any, **options: Any) -> Any:
        if args:
            raise TypeError(_by_position(cls, args))
        _refuse_unknown(cls, options)
        _refuse_values(cls, options)
        return create(cls) if create is object.__new__ else create(cls, **options)

    return __new__


def _refuse_unknown(cls: type[Any], options: dict[str, Any]) -> None:
    """Raise `TypeError` for an option that there is not, with its new name or the nearest."""
    known = cls.__pydantic_fields__
    for name in options:
        if name not in known:
            raise TypeError(f"{cls.__name__}({name}=…): {unknown(name, known, 'option')}")


def _refuse_values(cls: type[Any], options: dict[str, Any]) -> None:
    """Raise `TypeError` for what would be taken for something else: see what it calls."""
    torch = sys.modules.get("torch")
    for name, value in options.items():
        if isinstance(value, (str, type)):
            _refuse_name(cls, name, value)
        elif torch is not None and isinstance(value, torch.Tensor):
            _refuse_tensor(cls, name, value)


def _refuse_tensor(cls: type[Any], name: str, value: Any) -> None:
    """A tensor given as a number: it would be cut from its graph, unsaid."""
    annotation = cls.__pydantic_fields__[name].annotation
    if _is_number(annotation):
        raise TypeError(
            f"{cls.__name__}({name}=…) must be a number, got a tensor of shape "
            f"{tuple(value.shape)}: it would be read as one and cut from its graph, so that "
            f"nothing is differentiated in it; give {name}=tensor.item()"
            f"{_or_from_x(name, annotation)}"
        )


def _refuse_name(cls: type[Any], name: str, value: Any) -> None:
    """A component's class, or its name in a recipe, in the place of the component."""
    made = f"{cls.__name__}({name}=…)"
    if isinstance(value, type) and hasattr(value, "__pydantic_fields__"):
        raise TypeError(
            f"{made} must be a component, got the class {value.__name__}: give "
            f"{name}={value.__name__}()"
        )
    slot = _slot(cls.__pydantic_fields__[name]) if isinstance(value, str) else None
    if slot:
        raise TypeError(
            f"{made} must be a component, got the string {value!r}, which names one in a recipe "
            f"alone: make it, of one of the classes that `bilevel ls {slot.group}` lists"
        )


def _slot(field: Any) -> Slot | None:
    """The mark of a field that holds another component."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    marks = [*field.metadata, *(mark for kind in kinds for mark in typing.get_args(kind)[1:])]
    return next((mark for mark in marks if isinstance(mark, Slot)), None)


def _or_from_x(name: str, annotation: Any) -> str:
    """The other remedy, for an option that may be one of the upper variables."""
    kinds = [kind for kind in typing.get_args(annotation) if hasattr(kind, "__pydantic_fields__")]
    return "".join(f", or make it an entry of x: {name}={kind.__name__}(upper=…)" for kind in kinds)


def _is_number(annotation: Any) -> bool:
    """Whether an annotation takes a number: float, int | None, Annotated[int, ...] | None."""
    return annotation in (int, float) or any(map(_is_number, typing.get_args(annotation)))


def _by_position(cls: type[Any], args: tuple[Any, ...]) -> str:
    """What to write instead: each option that takes the value, or all options there are."""
    known = list(cls.__pydantic_fields__)
    fitting = [name for name in known if len(args) == 1 and _takes(cls, name, args[0])]
    given = ", ".join(map(repr, args))
    hint = f"its options are {', '.join(known)}" if known else "it has no options"
    if fitting:
        hint = "write " + " or ".join(f"{cls.__name__}({name}={given})" for name in fitting)
    return f"{cls.__name__}({given}): options are given by name; {hint}"


def _takes(cls: type[Any], name: str, value: Any) -> bool:
    try:
        cls(**{name: value})
    except (TypeError, ValueError, BilevelError):  # pydantic's ValidationError is a ValueError
        return False
    return True


@dataclass(frozen=True)
class Slot:
    """Marks a field that holds another component of `group`: `Annotated[LinearSolver, Slot("linear")]`."""

    group: str
