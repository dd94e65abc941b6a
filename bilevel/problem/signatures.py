"""Methods of a problem that a run would not call, or not as they are written: names and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from bilevel.errors import ProblemError
from bilevel.problem.protocol import OPTIONAL, Problem

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _arguments() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, method in vars(Problem).items():
        if isinstance(method, FunctionType) and not name.startswith("_"):
            yield name, tuple(inspect.signature(method).parameters)[1:]
    for name, optional in OPTIONAL.items():
        yield name, tuple(optional.signature[1:].partition(")")[0].split(", "))


ARGUMENTS: Mapping[str, tuple[str, ...]] = dict(_arguments())
"""By method of a problem: what it is called with, by position."""


def refuse_arguments(problem: Any) -> None:
    """Raise `ProblemError` for a method that does not take what it is called with, or in another order."""
    for part in _parts(problem):
        for name, given in ARGUMENTS.items():
            signature = _signature(getattr(part, name, None))
            if signature is None or (name == "prepare" and not signature.parameters):
                continue
            if not takes(signature, len(given)) or _is_swapped(signature, given):
                raise ProblemError(
                    f"{type(part).__name__}.{name}{signature} is called as {name}"
                    f"({', '.join(given)}), by position; define it with these arguments"
                )


def misspelt(problem: Any) -> list[str]:
    """What to say of each method whose name is close to that of an optional one.

    Public methods alone that the problem's own package defines, that could be called as the optional
    one, and only where the problem has no method of that name.
    """
    return [
        f"{type(part).__name__}.{name} is not a method that a run calls. Did you mean {known!r}? Give a "
        "helper of your own another name"
        for part in _parts(problem)
        for name, known in _close(part)
    ]


def _close(problem: Any) -> Iterator[tuple[str, str]]:
    """(a method, the optional method that its name is close to)."""
    for name in _own_methods(type(problem)):
        known = next((one for one in OPTIONAL if _is_close(name, one)), None)
        if known is None or name in ARGUMENTS or getattr(problem, known, None) is not None:
            continue
        signature = _signature(getattr(problem, name))
        if signature is not None and takes(signature, len(ARGUMENTS[known])):
            yield name, known


def _parts(problem: Any) -> Iterator[Any]:
    """A problem and those that it is made of, without what this package puts around one."""
    inner = getattr(problem, "problem", None)
    is_made = isinstance(inner, Problem)
    if not is_made or _package(type(problem)) != "bilevel":
        yield problem
    if is_made:
        yield from _parts(inner)


def _package(cls: type[Any]) -> str:
    return cls.__module__.partition(".")[0]


def _own_methods(cls: type[Any]) -> Iterator[str]:
    """Names of public methods, without those of a library's base class."""
    for base in cls.__mro__:
        if _package(base) == _package(cls):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType | staticmethod | classmethod) and name[0] != "_":
                    yield name


def _signature(method: Any) -> inspect.Signature | None:
    """None where there is no method, or one that does not tell."""
    try:
        return inspect.signature(method) if callable(method) else None
    except (TypeError, ValueError):
        return None


def takes(signature: inspect.Signature, count: int) -> bool:
    """Whether a function with this signature can be called with so many arguments by position."""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _is_swapped(signature: inspect.Signature, given: tuple[str, ...]) -> bool:
    """Whether it has the very names of what it is called with, in another order."""
    names = [p.name for p in signature.parameters.values() if p.kind in _BY_POSITION]
    first = tuple(names[: len(given)])
    return first != given and sorted(first) == sorted(given)


def _is_close(name: str, known: str) -> bool:
    """One letter apart, without regard to case and underscores; or the same words in another order."""
    if sorted(name.lower().split("_")) == sorted(known.split("_")):
        return name != known
    return name != known and _is_one_edit(*(n.lower().replace("_", "") for n in (name, known)))


def _is_one_edit(one: str, other: str) -> bool:
    """Whether at most one letter was left out, added, replaced, or swapped with the next."""
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) > 1:
        return False
    pairs = enumerate(zip(short, long, strict=False))
    at = next((index for index, (a, b) in pairs if a != b), len(short))
    if len(short) < len(long):
        return short[at:] == long[at + 1 :]
    swapped = short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :]
    return swapped or short[at + 1 :] == long[at + 1 :]
