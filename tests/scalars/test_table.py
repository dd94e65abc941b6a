"""Trees by a number, which are never written into."""

import copy

import torch

from bilevel.scalars.table import RowTable, table


def test_a_tree_is_found_by_its_number_and_is_zero_before():
    like = {"y": torch.ones(2, dtype=torch.float64)}
    empty = table({}, like)
    one = empty.put(3, {"y": torch.full((2,), 5.0, dtype=torch.float64)})
    assert empty.row(3)["y"].tolist() == [0.0, 0.0]
    assert empty.row(3)["y"].dtype == torch.float64
    assert one.row(3)["y"].tolist() == [5.0, 5.0]
    assert one.row(2)["y"].tolist() == [0.0, 0.0]
    assert not empty
    assert one.keys() == {"3"}


def test_it_is_saved_as_a_dict_and_made_of_one():
    made = table({}, {"y": torch.ones(2)}).put(0, {"y": torch.ones(2)})
    assert table(made, {}) is made
    again = table(dict(made), {"y": torch.ones(2)})
    assert again.look == made.look
    assert again.row(0)["y"] is made.row(0)["y"]
    copied = copy.deepcopy(made)
    assert type(copied) is RowTable
    assert copied.row(0)["y"].tolist() == [1.0, 1.0]
    assert copied.row(1)["y"].tolist() == [0.0, 0.0]


def test_what_is_put_lies_in_plain_memory():
    made = table({}, {"y": torch.ones(2, 3)}).put(0, {"y": torch.ones(3, 2).T})
    assert made.row(0)["y"].is_contiguous()
