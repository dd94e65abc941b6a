"""What makes a class a component: frozen, keyword-only, validated alike from YAML and from Python."""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from bilevel.errors import BilevelError, RecipeError, unknown

Where = tuple[str | int, ...]
"""The keys that lead to a value: ("lower", "optimizer", "lr")."""

UNSAID = object()
"""Stands for a value that a message does not show."""

IN_YAML: Mapping[str, str] = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be ≥ {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be ≤ {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "finite_number": "must be finite",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "is_instance_of": "must be a component of type {class}",
    "dataclass_exact_type": "must be a mapping of {class_name}'s options",
    "missing": "missing; there is no default",
}
"""What was expected, by pydantic's name of what was found; of options that a recipe gives."""
IN_PYTHON: Mapping[str, str] = {
    **IN_YAML,
    "bool_type": "must be True or False",
    "none_required": "must be None",
    "tuple_type": "must be a tuple",
    "dict_type": "must be a dict",
    "dataclass_exact_type": "must be a {class_name}",
}
"""Of options that Python gives, where nothing is made of a mapping or a list."""

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
    defaults. Options of a wrong type or value raise `RecipeError` with all that is wrong, in a
    recipe with the line; an unknown one, one given by position, and a tensor given as a number
    raise `TypeError`.
    """
    decorate = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=COMPONENT)
    made = cast("type[C]", decorate(cls))
    made.__new__ = _by_name_only(made)
    made.__init__ = _in_our_words(made.__init__)
    return made


def _in_our_words(init: Callable[..., None]) -> Callable[..., None]:
    """Pydantic's `__init__` of a component, which raises `RecipeError`; what pydantic found is its context."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        try:
            init(self, *args, **options)
        except pydantic.ValidationError as error:
            raise refusal(faults(error, options, type(self).__name__)) from None

    __init__.is_in_our_words = True  # pyright: ignore[reportAttributeAccessIssue]
    return __init__


def faults(error: pydantic.ValidationError, given: Any, name: str) -> list[str]:
    """`CG.iterations = 0; must be > 0`: a line for all that pydantic found in `given`, called `name`."""
    lines = []
    for part, (message, value) in refused(error, given, words=IN_PYTHON).items():
        place = ".".join(map(str, (name, *part)))
        lines.append(
            f"{place}: {message}" if value is UNSAID else f"{place} = {cut(value)}; {message}"
        )
    return lines


def refusal(lines: list[str]) -> RecipeError:
    """The error that says them."""
    return RecipeError(
        lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors", *lines])
    )


def _by_name_only(made: type[Any]) -> Any:
    """A `__new__` that refuses options by position.

    Pydantic's dataclass takes a field declared with `Field(...)` by position whatever `kw_only`
    says, and writes `__init__` again when it resolves a forward reference; `__new__` it leaves, which
    puts that right.
    """
    create = cast("Callable[..., Any]", made.__new__)

    def __new__(cls: type[Any], *args: Any, **options: Any) -> Any:
        if args:
            raise TypeError(_by_position(cls, args))
        if options:
            _refuse_unknown(cls, options)
            _refuse_values(cls, options)
        if not hasattr(made.__init__, "is_in_our_words"):
            made.__init__ = _in_our_words(made.__init__)
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


def refused(
    error: pydantic.ValidationError,
    given: Any,
    failed: Collection[str] = (),
    words: Mapping[str, str] = IN_YAML,
) -> dict[Where, tuple[str, Any]]:
    """What pydantic found in `given`, a value or options: (what was expected, what was got) by place.

    Of a component whose options in `failed` were complained about before, only the other
    options are judged.
    """
    found: dict[Where, tuple[list[str], Any]] = {}
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        if failed and (not loc or loc[0] in failed):
            continue
        is_missing = detail["type"] == "missing"
        place = loc if is_missing else _known_part(loc, given)
        unsaid = is_missing or (not place and isinstance(given, dict))
        messages, _ = found.setdefault(place, ([], UNSAID if unsaid else detail["input"]))
        messages.append(_expected(detail, words))
    return {place: (_either(messages), value) for place, (messages, value) in found.items()}


def show(value: Any) -> str:
    """A value as YAML would have it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return str(value["name"])
    return cut(list(value) if isinstance(value, tuple) else value)


def cut(value: Any) -> str:
    """A value as Python would have it, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _own_words(detail: Any) -> str:
    cause = detail.get("ctx", {}).get("error")
    return str(cause) if cause is not None else detail["msg"]


def _expected(detail: Any, words: Mapping[str, str]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return _own_words(detail)
    message = words.get(kind)
    text = message.format(**context) if message else detail["msg"][:1].lower() + detail["msg"][1:]
    if kind in ("int_type", "float_type") and _reads_as_number(detail["input"]):
        text += " (remove the quotes)"
    return text


def _either(messages: list[str]) -> str:
    first, *rest = dict.fromkeys(messages)
    return " or ".join([first, *(message.removeprefix("must be ") for message in rest)])


def _reads_as_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _known_part(loc: Where, given: Any) -> Where:
    """The location without pydantic's own tags for the members of a union."""
    known: list[str | int] = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:
            known.append(part)
            given = given[part]
        elif isinstance(given, (list, tuple)) and isinstance(part, int):
            known.append(part)
            given = given[part] if part < len(given) else None
    return tuple(known)
