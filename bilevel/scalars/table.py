"""Trees by a number, such as the rows that SAGA keeps of blocks, which a recorded step can look up.

A step that is recorded follows the number: a replay takes the tree that its own number says, where a
plain dict would make a step of each number another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.scalars.scalar import Recording, Scalar

Tree = dict[str, Tensor]


class RowTable(dict[str, Tree]):
    """A tree by number, 0 where none was put; a dict to whoever saves it, with the number as text.

    Never written into: `put` gives another, which shares the other trees, for a copy of the references.
    """

    def __init__(self, rows: Mapping[str, Tree], like: Tree) -> None:
        super().__init__(rows)
        self.zero = {name: torch.zeros_like(entry) for name, entry in like.items()}
        self.look = tuple((n, e.shape, e.dtype, e.device) for n, e in self.zero.items())
        """The same for tables that one record serves."""

    def __reduce__(self) -> Any:
        return RowTable, (dict(self), self.zero)

    def row(self, number: int) -> Tree:
        """The tree of a number."""
        if isinstance(number, Scalar):
            return number.tape.row(self, number)
        return self.get(str(number), self.zero)

    def put(self, number: int, tree: Tree) -> RowTable:
        """A table with this tree in the place of that of a number."""
        if isinstance(number, Scalar):
            return number.tape.put(self, number, tree)
        made = RowTable.__new__(RowTable)
        made.update(self)
        made[str(number)] = {name: entry.contiguous() for name, entry in tree.items()}
        made.zero, made.look = self.zero, self.look
        return made


def table(rows: Mapping[str, Tree], like: Tree) -> RowTable:
    """`rows` as a table: itself where it is one, a new one where it is a dict, as a saved state has it."""
    if type(rows) is RowTable:
        return rows
    return RowTable(rows, like) if Recording.tape is None else Recording.tape.table(rows, like)
