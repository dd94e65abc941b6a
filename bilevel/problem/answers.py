"""What an optional method of a problem gives, held to its form where it is called.

One that gave another shape would be broadcast, and so change the problem without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.rng import Seeded, Streams
from bilevel.types import Structure

FORMS: Mapping[str, tuple[int, str]] = {
    "lower_start": (1, "y"),
    "project_upper": (0, "x"),
    "project_lower": (0, "y"),
    "prox_lower": (1, "y"),
    "lower_map": (1, "y"),
    "hypergradient": (0, "x"),
}
"""By optional method: which of its arguments its answer has the form of, and the name of that.

`lower_solution(x)` has that of y, which it is not given: whoever calls it uses `require_form`. Numbers
of `lower_diagonal` may be of another dtype, and are looked at by the preconditioner.
"""

RESTRICTS: Mapping[str, str] = {
    "project": "project_lower",
    "prox": "prox_lower",
    "map": "lower_map",
}
"""By field of `Structure`: the optional method that gives it, of those that have a form."""


class Answered:
    """A method that is held to the form of one of its arguments at each call: `tree.is_like`, no operation."""

    def __init__(self, method: Callable[..., Any], said: str, position: int, level: str) -> None:
        update_wrapper(self, method)
        self._method, self._said, self._position, self._level = method, said, position, level
        self._is_cast = said.endswith(".lower_start")
        """A start may be data, which comes in the run's dtype as those of `init` do."""
        # by which a trace knows whose method it has frozen
        self.__self__ = getattr(method, "__self__", method)

    def __call__(self, *arguments: Any) -> Any:
        found, like = self._method(*arguments), arguments[self._position]
        if self._is_cast:
            found = _cast(found, like)
        require_form(found, like, self._said, self._level)
        return found


def answered(problem: Any, name: str) -> Any:
    """An optional method of a problem, held to its form where it has one; None where there is none."""
    method = getattr(problem, name, None)
    if method is None or name not in FORMS or isinstance(method, Answered):
        return method
    return Answered(method, said(problem, name), *FORMS[name])


def structured(structure: Structure) -> Structure:
    """What a caller says of y*, held to the form of the y that each is called with."""
    held = {}
    for field, name in RESTRICTS.items():
        method = getattr(structure, field)
        if method is not None and not isinstance(method, Answered):
            held[field] = Answered(method, f"structure.{field}", *FORMS[name])
    return replace(structure, **held) if held else structure


def said(problem: Any, name: str) -> str:
    """How messages begin: `MyProblem.lower_start`, of the problem whose own method it is."""
    while not hasattr(type(problem), name) and hasattr(problem, "problem"):
        problem = problem.problem
    return f"{type(problem).__name__}.{name}"


def require_form(found: Any, like: Any, said: str, level: str) -> None:
    """Raise `ProblemError` unless an answer has the names, shapes, dtypes and devices of `like`.

    Both may be nested, as the variables of a problem are.
    """
    if tree.is_like(found, like) and _shares_devices(found, like):
        return
    if tree.is_nested(found) and tree.is_nested(like):
        flat, wanted = tree.flat(found, said), tree.flat(like, level)
        if tree.is_like(flat, wanted) and _shares_devices(flat, wanted):
            return
        got, expected = _formed(flat), _formed(wanted)
    else:
        got, expected = tree.formed(found), _formed(tree.flat(like, level))
    nothing = "; it has no `return`: return a new dict, and write into nothing"
    raise ProblemError(
        f"{said} must return {level} as {expected}; got {got}{nothing if found is None else ''}"
    )


def _cast(found: Any, like: Any) -> Any:
    """Floating tensors in the dtypes of those of the same names."""
    if not isinstance(found, dict) or not isinstance(like, dict) or found.keys() != like.keys():
        return found
    return {
        name: entry.to(like[name].dtype)
        if tree.is_floating(entry) and tree.is_floating(like[name])
        else entry
        for name, entry in found.items()
    }


def _shares_devices(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> bool:
    return all(entry.device == like[name].device for name, entry in found.items())


def _formed(params: Mapping[str, Any]) -> str:
    """As `tree.formed`, with the devices that are not the CPU."""
    parts = (
        f"{name!r}: {tree.formed(entry)}"
        + (
            f" on {entry.device}"
            if isinstance(entry, Tensor) and entry.device.type != "cpu"
            else ""
        )
        for name, entry in params.items()
    )
    return "{" + ", ".join(parts) + "}"


def initial(problem: Any, streams: Streams, device: torch.device | None = None) -> tuple[Any, Any]:
    """x and y as `init` gives them, nested or not, with floating-point tensors for leaves.

    What it draws from a global random state, as the constructor of a module does, is of the seed too,
    on the CPU and on `device`.
    """
    with Seeded(streams.seed, "init.global", device):
        made = problem.init(streams)
    who = said(problem, "init")
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise ProblemError(
            f"{who} must return (x, y), two dicts of tensors; got a {type(made).__name__}"
        )
    x, y = made
    for params, name in ((x, "x"), (y, "y")):
        try:
            tree.require(tree.flat(params, name), name)
        except ProblemError as error:
            raise ProblemError(f"{who}: {error}") from error
    return x, y


def require_pair(pair: Any, said: str) -> None:
    """Raise `ProblemError` unless one of `episodes` is a pair of batches."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise ProblemError(
            f"{said} must yield pairs (lower batch, upper batch); got a {type(pair).__name__}{size}"
        )


def require_figures(found: Any, said: str) -> None:
    """Raise `ProblemError` unless `figures` gave a dict; each sink knows what it can draw of its values."""
    got = f"a {type(found).__name__}"
    if isinstance(found, Mapping):
        wrong = [name for name in found if not isinstance(name, str)]
        if not wrong:
            return
        got = f"{wrong[0]!r} for a name"
    raise ProblemError(f"{said} must return a dict of name: matplotlib figure; got {got}")
