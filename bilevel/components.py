"""What makes a class a component: frozen, keyword-only, validated alike from YAML and from Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field

COMPONENT = ConfigDict(
    extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
)

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def component(cls: type[C]) -> type[C]:
    """Make a class a component: frozen, keyword-only, validated alike from YAML and Python.

    The fields of a component are at once its recipe schema, its documentation and its
    defaults. Unknown or mistyped options raise `pydantic.ValidationError`, which the recipe
    loader turns into a `RecipeError` with the line.
    """
    decorate = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=COMPONENT)
    return cast("type[C]", decorate(cls))


@dataclass(frozen=True)
class Slot:
    """Marks a field that holds another component of `group`: `Annotated[LinearSolver, Slot("linear")]`."""

    group: str
