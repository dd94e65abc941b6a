"""Blocks of data: how a batch says which part of a finite data set it is.

A batch that is one of N equal parts of the data is a dict with the keys "block", its number from
0 to N − 1, and "blocks", N; the loss of the whole is the plain mean of those of its blocks. Where
there is no batch at all the data are one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.scalars.functions import gathered
from bilevel.scalars.scalar import Scalar
from bilevel.types import Loss

PATIENCE = 50
"""Draws a block, on average, before a pass over all of them is given up."""


def block_of(loss: Loss) -> tuple[int, int]:
    """(block, number of blocks) of the batch of a loss.

    Raises:
        ProblemError: the batch does not say.
    """
    return _block_of(loss.batch, loss.level)


def _block_of(batch: Any, level: str) -> tuple[int, int]:
    if batch is None:
        return 0, 1
    if not isinstance(batch, Mapping) or not {"block", "blocks"} <= batch.keys():
        raise ProblemError(
            f"{level}: saga and spider have to know which block of the data a batch is, and "
            f"this one, a {type(batch).__name__}, does not say; let {level}_batches yield "
            'dicts with "block" (0 … N − 1) and "blocks" (N), or use the direction plain, '
            "average or storm"
        )
    block, blocks = _number(batch["block"]), int(batch["blocks"])
    if not 0 <= block < blocks:
        raise ProblemError(
            f"{level}: got block {block} of {blocks}; expected a number from 0 to blocks − 1"
        )
    return block, blocks


def every_block(loss: Loss) -> list[Loss]:
    """The loss on each block once, in order, from batches drawn until all have been met.

    Raises:
        ProblemError: batches name no block, or some block does not come.
    """
    if block_of(loss)[1] == 1:
        return [loss]
    if loss.draws is None:
        return [loss.fresh()]  # which says that there is nothing to draw from
    return [loss.on(batch) for batch in gathered(loss.draws, _pass, loss.batch, loss.level)]


def _pass(draws: Iterator[Any], first: Any, level: str) -> list[Any]:
    """The first batch of each block, in the order of the blocks."""
    block, blocks = _block_of(first, level)
    met = {block: first}
    for _ in range(PATIENCE * blocks):
        if len(met) == blocks:
            return [met[b] for b in range(blocks)]
        drawn = next(draws)
        met.setdefault(_block_of(drawn, level)[0], drawn)
    raise ProblemError(
        f"{level}: a full pass met {len(met)} of {blocks} blocks in {PATIENCE * blocks} "
        f"batches; {level}_batches must draw every block"
    )


def _number(value: Any) -> Any:
    """A whole number; one that a recorded step follows stays what it is."""
    number: Any = value.item() if isinstance(value, Tensor) else value
    return number if isinstance(number, Scalar) else int(number)
