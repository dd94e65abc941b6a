"""Saved states of ranks that hold variables together: whole in a file, in parts in a run.

A file is the same however many ranks wrote it, and one process reads it without any. What of a state
is in parts is known by the names in it: tensors under an entry's name that have the entry's shape
(a tree, an optimizer's moments), and matrices whose name begins with `tree.ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.sharding.parts import Gather, team_of
from bilevel.tree import Part
from bilevel.types import Params


def wholes(state: Any, y: Params) -> Any:
    """A state whole, on the first rank, on its CPU; None stands for a tensor on the others.

    Every rank has to call it: one all-gather a tensor, and as much memory as the largest is as a whole.
    """
    team = team_of(y)
    if team is None:
        return state

    def whole(tensor: Tensor, name: Part | None) -> Tensor | None:
        if name is None or not _is_own(tensor, name):
            return tensor
        (made,) = Gather.forward(team, (name.shape[0],), tensor.detach())
        return made.cpu() if team.everyone.is_first else None

    def matrix(tensor: Tensor) -> Tensor | None:
        """By the entries that its rows belong to."""
        found, names = [], _parts(y)
        pieces = tensor.split([entry.numel() for entry in y.values()])
        for name, entry, piece in zip(names, y.values(), pieces, strict=True):
            found.append(whole(piece.reshape(*entry.shape, -1), name))
        if not team.everyone.is_first:
            return None
        return torch.cat([part.reshape(-1, tensor.shape[1]).cpu() for part in found])

    return _mapped(state, None, whole, matrix, lambda key, part: (str(key), key))


def parted(state: Any, x: Params, y: Params) -> Any:
    """The inverse: this rank's part of a whole state, under the names of x and y."""
    team = team_of(y)
    if team is None:
        return state
    known: dict[str, list[Part]] = {}
    for params in (y, x):
        for name in _parts(params):
            known.setdefault(str(name), []).append(name)

    def part(tensor: Tensor, name: Part | None) -> Tensor:
        if name is None or not name.rows or tensor.shape != name.shape:
            return tensor
        return tensor[name.rows].clone()

    def matrix(tensor: Tensor) -> Tensor:
        sizes = [name.shape.numel() for name in _parts(y)]
        pieces = zip(_parts(y), tensor.split(sizes), strict=True)
        rows = [p.reshape(*n.shape, -1)[n.rows] if n.rows else p for n, p in pieces]
        return torch.cat([piece.reshape(-1, tensor.shape[1]) for piece in rows])

    def named(key: Any, below: Any) -> tuple[Any, Any]:
        """The name of a part for one that a tensor below it has the shape of."""
        shapes = {leaf.shape for _, leaf in tree.named(below) if isinstance(leaf, Tensor)}
        found = next((name for name in known.get(key, ()) if name.shape in shapes), key)
        return found, found

    return _mapped(state, None, part, matrix, named)


def _mapped(
    value: Any,
    name: Part | None,
    tensor: Callable[[Tensor, Part | None], Any],
    matrix: Callable[[Tensor], Any],
    named: Callable[[Any, Any], tuple[Any, Any]],
) -> Any:
    """A nested state with its tensors replaced; `named` gives (the new key, what is below it of)."""
    if isinstance(value, Tensor):
        return tensor(value, name)
    if isinstance(value, list):
        return [_mapped(part, name, tensor, matrix, named) for part in value]
    if not isinstance(value, Mapping):
        return value
    found = {}
    for key, part in value.items():
        if isinstance(part, Tensor) and key.startswith(tree.ROWS):
            found[key] = matrix(part)
            continue
        new, below = named(key, part)
        below = below if isinstance(below, Part) else name
        found[new] = _mapped(part, below, tensor, matrix, named)
    return found


def _parts(params: Params) -> list[Part]:
    return [name for name in params if isinstance(name, Part)]


def _is_own(tensor: Tensor, name: Part) -> bool:
    """Whether it is a rank's part of an entry, rather than a counter beside it."""
    if name.rows is None:
        return False
    return tensor.shape[:1] == (name.rows.stop - name.rows.start,) and (
        tensor.shape[1 : len(name.shape)] == name.shape[1:]
    )
