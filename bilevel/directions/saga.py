"""SAGA: a table of the last draw of each block. Defazio, Bach and Lacoste-Julien (2014), NIPS.

In bilevel methods: SABA (Dagréou et al. 2022, arXiv:2201.13409).
"""

from __future__ import annotations

from functools import reduce
from typing import Any, ClassVar

from bilevel import tree
from bilevel.components import component
from bilevel.directions.quantity import StochasticQuantity
from bilevel.scalars.table import table
from bilevel.types import Params


@component
class Saga:
    """d_t = q(z_t; i) − table_i + mean of the table, then table_i ← q(z_t; i); empty rows are 0.

    The shares of the lower and of the upper batch have a table each. Unbiased where blocks are
    drawn evenly; variance falls to zero as z settles. 1 evaluation. Memory: a copy of the
    quantity for each block. Raises `ProblemError` where batches name no block.
    """

    by_block: ClassVar[bool] = True

    @property
    def looks_back(self) -> bool:
        return False

    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        corrected, kept = [], {}
        for share, now in draw.shares().items():
            block, blocks = draw.block(share)
            part, kept[share] = _corrected(now, memory.get(share), block, blocks)
            corrected.append(part)
        return reduce(tree.add, corrected), kept


def _corrected(
    now: Params, memory: dict[str, Any] | None, block: int, blocks: int
) -> tuple[Params, dict[str, Any]]:
    memory = memory or {"mean": tree.zeros_like(now), "rows": {}}
    rows = table(memory["rows"], now)
    off = tree.sub(now, rows.row(block))
    mean = tree.axpy(1 / blocks, off, memory["mean"])
    return tree.add(off, memory["mean"]), {"mean": mean, "rows": rows.put(block, now)}
