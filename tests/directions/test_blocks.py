"""A pass over the data, block by block."""

import itertools

import pytest
import torch

from bilevel.directions.blocks import every_block
from bilevel.errors import ProblemError
from bilevel.types import Counts, Loss


def loss_over(orders):
    draws = iter(orders)
    return Loss(lambda x, y, b: y["y"].sum(), next(draws), Counts(), "lower", draws)


def test_a_pass_has_each_block_once_in_order():
    orders = [{"block": b, "blocks": 3} for b in (1, 1, 0, 1, 2, 0)]
    assert [loss.batch["block"] for loss in every_block(loss_over(orders))] == [0, 1, 2]


def test_a_pass_waits_for_a_block_that_is_late():
    """Fifty draws a block are allowed: 100 for two of them."""
    late = [{"block": 0, "blocks": 2}] * 99 + [{"block": 1, "blocks": 2}]
    assert [loss.batch["block"] for loss in every_block(loss_over(late))] == [0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": 1}, 'lower: .*dicts with "block"'),
        (torch.ones(2), "a Tensor, does not say"),
        ({"block": 3, "blocks": 3}, "block 3 of 3"),
        ({"block": 0, "blocks": 2}, "met 1 of 2 blocks in 100 batches"),
    ],
)
def test_batches_that_name_no_block_are_refused(batch, message):
    with pytest.raises(ProblemError, match=message):
        every_block(loss_over(itertools.repeat(batch)))


def test_no_batch_at_all_is_one_block():
    loss = Loss(lambda x, y, b: y["y"].sum(), None, Counts(), "lower")
    assert every_block(loss) == [loss]
