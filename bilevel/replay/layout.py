"""Nested values taken apart and put together, in every replay: the quick ways of `bilevel.tree`'s.

What a replay is given are the tensors, numbers and tables in them; everything else is part of the
layout. Both ways are written as straight code for one layout and compiled, since to walk through a
nested value takes longer than the operations of a small step.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.scalars.table import RowTable

Take = Callable[[Any], list[Any] | None]
"""A nested value ↦ its leaves that are given, in order; None where it has another layout."""
Rebuild = Callable[[Any], Any]
"""The leaves that are given, in order and by their place ↦ the nested value."""


MOST = 300
"""Leaves of a value for which code is written."""


class _Hole:
    """In the place of a leaf that a replay gives."""


GIVEN = _Hole()


def is_given(leaf: Any) -> bool:
    """Whether a leaf is a tensor, a number or a table."""
    return isinstance(leaf, Tensor) or type(leaf) in (int, float, RowTable)


def given_leaves(value: Any) -> Iterator[Any]:
    """The leaves that are given, in the order of `tree.map_nested`, as `taker` has them."""
    if is_given(value):
        yield value
    elif tree.is_nested(value):
        for _, part in tree.parts(value):
            yield from given_leaves(part)


class _Code:
    """Lines of a function, and the objects that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self._count = itertools.count()

    def name(self, value: Any = None) -> str:
        """A new name, which stands for `value`."""
        found = f"v{next(self._count)}"
        self.names[found] = value
        return found

    def function(self, result: str) -> Any:
        body = "\n    ".join([*self.lines, f"return {result}"])
        exec(compile(f"def made(given):\n    {body}", "<layout>", "exec"), self.names)
        return self.names["made"]


def taker(like: Any) -> Take:
    """What takes apart the values of the layout of `like`: those that one record serves."""
    code = _Code()
    leaves: list[str] = []
    if sum(1 for _ in tree.named(like)) > MOST:
        _write_any(like, "given", code, leaves)
        return code.function(leaves[0].removesuffix("[0]") if leaves else "[]")
    _write_take(like, "given", code, leaves)
    return code.function(f"[{', '.join(leaves)}]")


def _write_take(like: Any, given: str, code: _Code, leaves: list[str]) -> None:
    kind = type(like)
    if isinstance(like, Tensor):
        _unless(_is_such_tensor(like, given, code), code)
        leaves.append(given)
    elif is_given(like):
        look = f" and {given}.look == {code.name(like.look)}" if kind is RowTable else ""
        _unless(f"type({given}) is {code.name(kind)}{look}", code)
        leaves.append(given)
    elif kind in (dict, list, tuple):
        held = (
            f"{given}.keys() == {code.name(frozenset(like))}"
            if kind is dict
            else f"len({given}) == {len(like)}"
        )
        _unless(f"type({given}) is {code.name(kind)} and {held}", code)
        for key, part in like.items() if kind is dict else enumerate(like):
            _write_part(part, f"{given}[{code.name(key)}]", code, leaves)
    elif dataclasses.is_dataclass(like) and not isinstance(like, type):
        _unless(f"type({given}) is {code.name(kind)}", code)
        for field in dataclasses.fields(like):
            _write_part(getattr(like, field.name), f"{given}.{field.name}", code, leaves)
    elif tree.is_nested(like):
        _write_any(like, given, code, leaves)
    else:
        value = code.name(like)
        _unless(f"{given} is {value} or {code.name(_is_equal)}({given}, {value})", code)


def _is_such_tensor(like: Tensor, given: str, code: _Code) -> str:
    """The expression of whether a tensor has the form of `like`; of plain memory by the cheaper questions."""
    code.names["Tensor"] = Tensor
    # which of another with its shape says the same of every stride that counts
    stride = (
        "is_contiguous()" if like.is_contiguous() else f"stride() == {code.name(like.stride())}"
    )
    device = "is_cpu" if like.is_cpu else f"device == {code.name(like.device)}"
    return (
        f"isinstance({given}, Tensor) and {given}.shape == {code.name(like.shape)} and {given}.{stride}"
        f" and {given}.dtype is {code.name(like.dtype)} and {given}.{device}"
        f" and {given}.requires_grad is {like.requires_grad}"
    )


def _write_any(like: Any, given: str, code: _Code, leaves: list[str]) -> None:
    """For containers of kinds that have no code of their own, and large ones."""
    found = code.name()
    _unless(f"{code.name(_layout)}({given}) == {code.name(_layout(like))}", code)
    code.lines.append(f"{found} = [*{code.name(given_leaves)}({given})]")
    leaves += [f"{found}[{k}]" for k, _ in enumerate(given_leaves(like))]


def _is_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # an array, which says so of each of its numbers
        return False


def _write_part(part: Any, given: str, code: _Code, leaves: list[str]) -> None:
    name = code.name()
    code.lines.append(f"{name} = {given}")
    _write_take(part, name, code, leaves)


def _unless(holds: str, code: _Code) -> None:
    code.lines.append(f"if not ({holds}): return None")


def _layout(value: Any) -> Any:
    """Equal for two values that one record serves."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    kind = type(value)
    if is_given(value):
        return (kind, value.look) if kind is RowTable else kind
    if tree.is_nested(value):
        return kind, [(where, _layout(part)) for where, part in tree.parts(value)]
    return value


def rebuilder(like: Any) -> Rebuild:
    """What makes `like` again with leaves in the place of `GIVEN`. Parts without any are not copied."""
    code, places = _Code(), itertools.count()
    return code.function(_write_made(like, code, places) or code.name(like))


def _write_made(like: Any, code: _Code, places: Iterator[int]) -> str | None:
    """The expression of a value with leaves in it; None where there are none."""
    if like is GIVEN:
        return f"given[{next(places)}]"
    if not tree.is_nested(like):
        return None
    kind: Any = type(like)
    if dataclasses.is_dataclass(kind):
        made = {
            f.name: _write_made(getattr(like, f.name), code, places)
            for f in dataclasses.fields(like)
        }
        made = {name: one for name, one in made.items() if one}
        if not made:
            return None
        if not hasattr(like, "__dict__"):
            entries = ", ".join(f"{name}={one}" for name, one in made.items())
            return f"{code.name(_with_slots)}({code.name(like)}, {entries})"
        kept = {n: part for n, part in vars(like).items() if not _is_computed(kind, n)}
        parts = {name: made.get(name) or code.name(part) for name, part in kept.items()}
        entries = ", ".join(f"{name!r}: {one}" for name, one in parts.items())
        return f"{code.name(_with_fields)}({code.name(kind)}, {{{entries}}})"
    if kind in (dict, list, tuple):
        rows = list(like.items() if kind is dict else enumerate(like))
        made = [_write_made(part, code, places) for _, part in rows]
        if not any(made):
            return None
        parts = [one or code.name(part) for one, (_, part) in zip(made, rows, strict=True)]
        if kind is dict:
            parts = [f"{code.name(key)}: {one}" for one, (key, _) in zip(parts, rows, strict=True)]
            return f"{{{', '.join(parts)}}}"
        return f"[{', '.join(parts)}]" if kind is list else f"({', '.join(parts)},)"
    count = sum(leaf is GIVEN for _, leaf in tree.named(like))
    if not count:
        return None
    taken = ", ".join(f"given[{next(places)}]" for _ in range(count))
    return f"{code.name(_refilled)}({code.name(like)}, [{taken}])"


def _is_computed(kind: Any, name: str) -> bool:
    """Whether an attribute is computed once from others, and so again of others."""
    return isinstance(getattr(kind, name, None), cached_property)


def _with_fields(kind: Any, entries: dict[str, Any]) -> Any:
    made = _new(kind)
    _set(made, "__dict__", entries)
    return made


_new, _set = object.__new__, object.__setattr__


def _with_slots(like: Any, **entries: Any) -> Any:
    made = copy.copy(like)
    for name, entry in entries.items():
        object.__setattr__(made, name, entry)
    return made


def _refilled(like: Any, leaves: list[Any]) -> Any:
    found = iter(leaves)
    return tree.map_nested(lambda leaf: next(found) if leaf is GIVEN else leaf, like)
