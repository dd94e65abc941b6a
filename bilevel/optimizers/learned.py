"""Options of a lower optimizer that are upper variables: a learned learning rate, a learned momentum.

Maclaurin, Duvenaud and Adams (2015), arXiv:1502.03492; one for each coordinate: Meta-SGD, Li et al.
(2017), arXiv:1707.09835.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import tree
from bilevel.components import component
from bilevel.errors import ProblemError, nearest
from bilevel.sharding.parts import for_rows
from bilevel.types import Optimizer, Params

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda value: value,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}


@component
class Learned:
    """transform(x[upper]) in the place of a number, differentiated by estimators that unroll.

    One scalar for all of y, or one for each coordinate: x[upper] may have any shape that broadcasts
    to every entry of y, and x may hold an entry `upper.name` for each entry `name` of y, as a
    nested x = {"lr": {"weight": …, "bias": …}} does for `upper` "lr". "exp" and "softplus" keep a
    learning rate above 0, "sigmoid" a momentum in (0, 1).
    """

    upper: str
    """The entry of x, or the common beginning of one for each entry of y."""
    transform: Literal["identity", "exp", "sigmoid", "softplus"] = "identity"

    def __str__(self) -> str:
        named = f"x[{self.upper!r}]"
        return named if self.transform == "identity" else f"{self.transform}({named})"

    def entries(self, x: Params) -> Params:
        """The entries of x that it is made of.

        Raises:
            ProblemError: there are none.
        """
        if self.upper in x:
            return {name: entry for name, entry in x.items() if name == self.upper}
        found = {name: entry for name, entry in x.items() if name.startswith(f"{self.upper}.")}
        if found:
            return found
        close = nearest(self.upper, x)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ProblemError(
            f"an option of the lower optimizer is {self}, and x has no entry {self.upper!r}: it has "
            f"{', '.join(map(repr, x))}{hint}"
        )

    def at(self, x: Params, y: Params) -> Params:
        """Its value for each entry of y, with its graph back to x.

        Raises:
            ProblemError: x has no such entry, none for an entry of y, or one of another shape.
        """
        entries, values = self.entries(x), {}
        for name, entry in y.items():
            key = self.upper if self.upper in entries else f"{self.upper}.{name}"
            if key not in entries:
                raise ProblemError(
                    f"an option of the lower optimizer is {self}, and x has no entry {key!r} for "
                    f"y[{name!r}]; give it one, or one entry {self.upper!r} for all of y"
                )
            shape = torch.Size(tree.shapes({name: entry})[name])
            if not _broadcasts(torch.Size(tree.shapes(entries)[key]), shape):
                raise ProblemError(
                    f"x[{key!r}], an option of the lower optimizer, has shape "
                    f"{tuple(entries[key].shape)}, expected a scalar or what broadcasts to y[{name!r}] "
                    f"of shape {tuple(shape)}"
                )
            value = for_rows(name, next(k for k in entries if k == key), entries[key])
            values[name] = TRANSFORMS[self.transform](value).to(entry.dtype)
        return values


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape times one of the other has the other's."""
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def learned(optimizer: Optimizer) -> dict[str, Learned]:
    """The options of an optimizer, or of the one that it wraps, that are upper variables."""
    options = getattr(getattr(optimizer, "wrapped", optimizer), "__dict__", {})
    return {name: option for name, option in options.items() if isinstance(option, Learned)}


def upper_entries(optimizer: Optimizer, x: Params) -> Params:
    """The entries of x that an optimizer's steps depend on."""
    return {k: v for option in learned(optimizer).values() for k, v in option.entries(x).items()}


def bound(optimizer: Optimizer, x: Params, y: Params) -> Optimizer:
    """The optimizer with its learned options at x: trees like y with their graphs, not validated.

    Itself where it has none. Raises `ProblemError` as `Learned.at` does.
    """
    options = learned(optimizer)
    if not options:
        return optimizer
    made = copy.copy(optimizer)
    wrapped = getattr(optimizer, "wrapped", None)
    if wrapped is not None:
        object.__setattr__(made, "wrapped", bound(wrapped, x, y))
        return made
    for name, option in options.items():
        object.__setattr__(made, name, option.at(x, y))
    return made


def require_in_range(optimizer: Optimizer, x: Params, y: Params) -> None:
    """Raise `ProblemError` for a learned option at x that the optimizer would not take as a number."""
    rule: Any = getattr(optimizer, "wrapped", optimizer)
    for name, option in learned(optimizer).items():
        for value in option.at(x, y).values():
            for extreme in (value.min(), value.max()) if value.numel() else ():
                number: Any = float(extreme)
                try:
                    replace(rule, **{name: number})
                except ValueError as error:
                    raise ProblemError(
                        f"{type(rule).__name__}: {name} = {option} is {number:.3g}, "
                        f"which it does not take; {REMEDY.get(option.transform, _SMALLER)}"
                    ) from error


REMEDY = {
    "identity": "transform it: exp or softplus keep it positive, sigmoid in (0, 1)",
}
_SMALLER = "begin elsewhere, or take a smaller upper.optimizer.lr"
