"""Blocks of data: how a batch says which part of a finite data set it is.

A batch that is one of N equal parts of the data is a dict with the keys "block", its number from
0 to N − 1, and "blocks", N; the loss of the whole is the plain mean of those of its blocks. Where
there is no batch at all the data are one block.
"""

from __future__ import annotations

from collections.abc import Mapping

from bilevel.errors import ProblemError
from bilevel.types import Loss

PATIENCE = 50
"""Draws a block, on average, before a pass over all of them is given up."""


def block_of(loss: Loss) -> tuple[int, int]:
    """(block, number of blocks) of the batch of a loss.

    Raises:
        ProblemError: the batch does not say.
    """
    batch = loss.batch
    if batch is None:
        return 0, 1
    if not isinstance(batch, Mapping) or not {"block", "blocks"} <= batch.keys():
        raise ProblemError(
            f"{loss.level}: saga and spider have to know which block of the data a batch is, and "
            f"this one, a {type(batch).__name__}, does not say; let {loss.level}_batches yield "
            'dicts with "block" (0 … N − 1) and "blocks" (N), or use the direction plain, '
            "average or storm"
        )
    block, blocks = int(batch["block"]), int(batch["blocks"])
    if not 0 <= block < blocks:
        raise ProblemError(
            f"{loss.level}: got block {block} of {blocks}; expected a number from 0 to blocks − 1"
        )
    return block, blocks


def every_block(loss: Loss) -> list[Loss]:
    """The loss on each block once, in order, from batches drawn until all have been met.

    Raises:
        ProblemError: batches name no block, or some block does not come.
    """
    block, blocks = block_of(loss)
    met = {block: loss}
    for _ in range(PATIENCE * blocks):
        if len(met) == blocks:
            return [met[b] for b in range(blocks)]
        drawn = loss.fresh()
        met[block_of(drawn)[0]] = drawn
    raise ProblemError(
        f"{loss.level}: a full pass met {len(met)} of {blocks} blocks in {PATIENCE * blocks} "
        f"batches; {loss.level}_batches must draw every block"
    )
