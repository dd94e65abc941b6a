"""A number read from a tensor while a step is recorded (`bilevel.replay`), in the place of a float.

It computes as floats do, and each operation is noted. A branch that it decides is noted as well, to
be looked at again in each replay. Wherever it is turned into a plain number (`float`, `range`, a
format) its value is what is noted: a replay in which it has another is none of the same step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor


class Tape(Protocol):
    """What notes the operations of a step."""

    def call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """function(*given, **options) with the numbers in the places of scalars, noted as one operation."""
        ...

    def expect(self, function: Callable[..., bool], *given: Any) -> bool:
        """The answer, which replays must find again."""
        ...

    def table(self, rows: Any, like: dict[str, Tensor]) -> Any:
        """A new `bilevel.scalars.table.RowTable`."""
        ...

    def row(self, table: Any, number: Scalar) -> dict[str, Tensor]:
        """The tree of a number in a table."""
        ...

    def put(self, table: Any, number: Scalar, tree: dict[str, Tensor]) -> Any:
        """The table with another tree for a number."""
        ...

    def specialise(self, scalar: Scalar) -> Any:
        """Its number, which replays must find again."""
        ...

    def makes_anew(self, entries: Iterable[Tensor]) -> bool:
        """Whether what would be written into these is to be new tensors: operations without writes can be compiled."""
        ...


LARGE = 2**16
"""Numbers of a tensor from which on a record holds none that could be computed again, and writes where
the step writes: an option of an estimator that saves memory so would else be undone."""


class Recording:
    """Whether a step is recorded now, and by what."""

    tape: Tape | None = None


class Scalar:
    """A number of a step that is recorded."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]
    __slots__ = ("node", "tape", "value")

    def __init__(self, value: Any, node: Any, tape: Tape) -> None:
        self.value, self.node, self.tape = value, node, tape

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors that takes this number among its arguments."""
        return lambda *given, **options: self.tape.call(function, *given, **options)

    def __float__(self) -> float:
        return float(self.tape.specialise(self))

    def __int__(self) -> int:
        return int(self.tape.specialise(self))

    def __index__(self) -> int:
        return operator.index(self.tape.specialise(self))

    def __bool__(self) -> bool:
        return self.tape.expect(bool, self)

    def __repr__(self) -> str:
        return repr(self.tape.specialise(self))

    def __format__(self, form: str) -> str:
        return format(self.tape.specialise(self), form)


def _arithmetic(name: str) -> None:
    plain = getattr(operator, name)

    def here(self: Scalar, other: Any) -> Any:
        return self.tape.call(plain, self, other) if _goes_with(other) else NotImplemented

    def reflected(self: Scalar, other: Any) -> Any:
        return self.tape.call(plain, other, self) if _goes_with(other) else NotImplemented

    setattr(Scalar, f"__{name}__", here)
    setattr(Scalar, f"__r{name}__", reflected)


def _comparison(name: str) -> None:
    plain = getattr(operator, name)

    def here(self: Scalar, other: Any) -> Any:
        return self.tape.expect(plain, self, other) if _is_number(other) else NotImplemented

    setattr(Scalar, f"__{name}__", here)


def _unary(name: str) -> None:
    plain = getattr(operator, name)
    setattr(Scalar, f"__{name}__", lambda self: self.tape.call(plain, self))


def _is_number(other: Any) -> bool:
    return isinstance(other, (Scalar, float, int))


def _goes_with(other: Any) -> bool:
    return isinstance(other, Tensor) or _is_number(other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _arithmetic(_name)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _comparison(_name)
for _name in ("neg", "pos", "abs"):
    _unary(_name)
