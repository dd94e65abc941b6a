"""Whether what Python remembers of a problem has changed since a step of it was recorded.

A record has the numbers and tensors that losses found in attributes of their problem, or in the
closures of functions among them, as they were. Those can be looked at in a few microseconds; what
else a loss may remember (globals, entries of lists) only a comparison with the step itself finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

DEPTH = 3
MOST = 300
"""Attributes looked at."""
_PLAIN = (bool, int, float, str, type(None), Tensor)


class PythonState:
    """The numbers, strings and tensors in the attributes of an object and of those that it holds."""

    def __init__(self, owner: Any) -> None:
        found = list(_places(owner, DEPTH, set()))[:MOST]
        self._in_dicts = [(at, key, at.get(key)) for at, key in found if isinstance(at, dict)]
        self._in_cells = [
            (at, key, at.cell_contents) for at, key in found if not isinstance(at, dict)
        ]

    def changed(self) -> str | None:
        """The name of an attribute that is another now; None where there is none."""
        for held, key, before in self._in_dicts:
            now = held.get(key)
            if now is not before and _is_another(now, before):
                return key
        for cell, key, before in self._in_cells:
            now = cell.cell_contents if _is_filled(cell) else None
            if now is not before and _is_another(now, before):
                return key
        return None


def _is_another(now: Any, before: Any) -> bool:
    return isinstance(before, Tensor) or isinstance(now, Tensor) or now != before


def _places(owner: Any, depth: int, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """(dict or cell, name) of everything plain below an object."""
    if not depth or id(owner) in seen or isinstance(owner, (type, ModuleType, *_PLAIN)):
        return
    seen.add(id(owner))
    if isinstance(owner, MethodType):
        yield from _places(owner.__self__, depth, seen)
        return
    parts: list[tuple[Any, str, Any]] = []
    if isinstance(owner, dict):
        parts = [(owner, key, part) for key, part in owner.items() if isinstance(key, str)]
    elif isinstance(owner, FunctionType):
        cells = zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True)
        parts = [(cell, name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    elif hasattr(owner, "__dict__"):
        held = vars(owner)
        parts = [(held, key, part) for key, part in held.items()]
    for place, key, part in parts:
        if isinstance(part, _PLAIN):
            yield place, key
        else:
            yield from _places(part, depth - 1, seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
