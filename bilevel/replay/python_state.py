"""Whether what Python remembers of a problem has changed since a record was made of it.

A record has the numbers and tensors that losses found in attributes of their problem, in entries of its
dicts, or in the closures of functions among them, as they were. Those can be looked at in a few
microseconds; what else a loss may remember (globals, attributes of classes, entries of lists) only a
comparison with the loss itself finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

DEPTH = 3
"""Objects within each other; a problem and the one that it is made of (`.problem`) count as one."""
MOST = 300
"""Attributes looked at."""
_VALUES = (bool, int, float, complex, str, bytes, type(None))
_PLAIN = (*_VALUES, Tensor)
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that torch keeps beside the parameters, buffers and parts of a module."""
_PARTS_OF_MODULES = ("_parameters", "_buffers", "_modules")


class PythonState:
    """The attributes of an object and of those that it holds, as they are now."""

    def __init__(self, owner: Any) -> None:
        found = list(_objects(owner, DEPTH, set()))
        places = [(at, name) for at, names in found for name in names][:MOST]
        self._in_dicts = [(at, name, at[name]) for at, name in places if isinstance(at, dict)]
        self._in_cells = [
            (at, name, at.cell_contents) for at, name in places if not isinstance(at, dict)
        ]
        self._sizes = [(at, len(at)) for at, names in found[:MOST] if isinstance(names, _Names)]

    def changed(self) -> str | None:
        """The name of an attribute that is another now, or was not there; None where there is none."""
        return self.replaced() or self.added()

    def replaced(self) -> str | None:
        """The name of an attribute that is another now."""
        for held, name, before in self._in_dicts:
            now = held.get(name)
            if now is not before and _is_another(now, before):
                return str(name)
        for cell, name, before in self._in_cells:
            now = cell.cell_contents if _is_filled(cell) else None
            if now is not before and _is_another(now, before):
                return name
        return None

    def added(self) -> str | None:
        """The name of an attribute that was not there, such as a cached property."""
        for held, size in self._sizes:
            if len(held) > size:
                return str([*held][-1])
        return None


class _Names(list[str]):
    """Those of the attributes of an object, not of the entries of a dict."""


def _is_another(now: Any, before: Any) -> bool:
    return not (isinstance(now, _VALUES) and isinstance(before, _VALUES) and now == before)


def _objects(owner: Any, depth: int, seen: set[int]) -> Iterator[tuple[Any, list[Any]]]:
    """(dict or cell, names in it that are looked at) of an object and of what it holds, itself first."""
    if not depth or id(owner) in seen or isinstance(owner, (type, ModuleType, *_PLAIN)):
        return
    seen.add(id(owner))
    if isinstance(owner, MethodType):
        yield from _objects(owner.__self__, depth, seen)
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(owner, dict):
        parts = [*owner.items()]
        yield owner, [name for name, part in parts if not _is_iterator(part)]
    elif isinstance(owner, FunctionType):
        cells = zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True)
        for name, cell in cells:
            if _is_filled(cell):
                parts.append((name, cell.cell_contents))
                yield cell, [name]
    elif hasattr(owner, "__dict__"):
        held, is_module = vars(owner), isinstance(owner, nn.Module)
        parts = [(n, p) for n, p in held.items() if not (is_module and n in _OF_MODULES)]
        yield held, _Names(name for name, part in parts if not _is_iterator(part))
        if is_module:
            tables = [held[name] for name in _PARTS_OF_MODULES]
            yield from ((table, [*table]) for table in tables)
            parts += [entry for table in tables for entry in table.items()]
    for name, part in parts:
        yield from _objects(part, depth - (name != "problem"), seen)


def _is_iterator(part: Any) -> bool:
    """Which go on as batches are drawn, and which no pure loss reads."""
    return hasattr(part, "__next__")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
