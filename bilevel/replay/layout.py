"""Nested values taken apart and put together, in every replay: the quick ways of `bilevel.tree`'s.

What a replay is given are the tensors and numbers in them; everything else is part of the layout.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.scalars.table import Table

Rebuild = Callable[[Iterator[Any]], Any]
"""The leaves that are given, in order ↦ the nested value."""


class _Hole:
    """In the place of a leaf that a replay gives."""


GIVEN = _Hole()


def is_given(leaf: Any) -> bool:
    """Whether a leaf is a tensor, a number or a table."""
    return isinstance(leaf, Tensor) or type(leaf) in (int, float, Table)


def spread(value: Any, leaves: list[Any]) -> Any:
    """The layout of a nested value, equal for two that one record serves; its tensors and numbers
    are added to `leaves`."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    kind = type(value)
    if kind in (int, float):
        leaves.append(value)
        return kind
    if kind is Table:
        leaves.append(value)
        return kind, value.look
    if kind is dict:
        return {key: spread(part, leaves) for key, part in value.items()}
    if tree.is_nested(value):
        return kind, [(where, spread(part, leaves)) for where, part in tree.parts(value)]
    return value


def rebuilder(like: Any) -> Rebuild | None:
    """What makes `like` again with leaves in the place of `GIVEN`; None where there are none.

    Parts without any are not copied.
    """
    if like is GIVEN:
        return next
    if not tree.is_nested(like):
        return None
    kind: Any = type(like)
    if dataclasses.is_dataclass(kind):
        fields = [(f.name, rebuilder(getattr(like, f.name))) for f in dataclasses.fields(like)]
        return _of_fields(like, [(name, make) for name, make in fields if make])
    if kind in (dict, list, tuple):
        entries = like.items() if kind is dict else enumerate(like)
        rows = [(key, part, rebuilder(part)) for key, part in entries]
        return _of_rows(kind, rows) if any(make for _, _, make in rows) else None
    return lambda leaves: tree.map_nested(
        lambda leaf: next(leaves) if leaf is GIVEN else leaf, like
    )


def _of_fields(like: Any, fields: list[tuple[str, Rebuild]]) -> Rebuild | None:
    def make(leaves: Iterator[Any]) -> Any:
        made = copy.copy(like)
        for name, part in fields:
            object.__setattr__(made, name, part(leaves))
        return made

    return make if fields else None


def _of_rows(kind: type[Any], rows: list[tuple[Any, Any, Rebuild | None]]) -> Rebuild:
    def make(leaves: Iterator[Any]) -> Any:
        made = ((key, part(leaves) if part else value) for key, value, part in rows)
        return dict(made) if kind is dict else kind(part for _, part in made)

    return make
