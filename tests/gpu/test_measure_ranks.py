"""What `make gpu-check` measures of ranks is measured here at a small size, on the CPU."""

import pytest
import torch

from bilevel import tree
from tests.gpu.measure_ranks import Product, Size, Transformer, measured, saved, table

SMALL = Size(width=8, layers=1, tokens=4, words=16, rows=5)


def test_products_over_ranks_are_those_of_one_process_and_send_the_size_of_y():
    found = measured("cpu", SMALL, torch.float64, start="fork")
    alone, one, two, *shared = found.values()
    assert one.norm == pytest.approx(alone.norm, rel=1e-13)
    assert two.norm == pytest.approx(alone.norm, rel=1e-13)
    assert (alone.calls, alone.bytes) == (0, 0)
    numbers = tree.size(Transformer(SMALL).init(None)[1])
    assert two.calls == one.calls == 1
    assert two.bytes == one.bytes == 8 * numbers
    for half in shared:
        assert half.norm == pytest.approx(alone.norm, rel=1e-13)
    whole, again = shared
    assert whole.bytes == 2 * 8 * numbers  # gathered, and scattered
    assert again.bytes > whole.bytes


def test_the_table_has_ratios_and_what_is_off():
    alone, two = Product(0.01, 0, 0, 0, 2.0), Product(0.03, 1, 4_000_000, 9_000_000, 2.002)
    last = table({"one process": alone, "two": two}).splitlines()[-1]
    assert last == "| two | 30.0 ms, 3.00 times | 1 | 4.0 | 9 | 1.0e-03 |"


def test_a_state_in_parts_is_saved_whole_and_read_as_parts():
    found = saved("cpu", SMALL, torch.float64, start="fork")
    assert found.is_same
    numbers = tree.size(Transformer(SMALL).init(None)[1])
    assert found.bytes > 8 * numbers  # y, and what the optimizers keep
    assert min(found.gathered, found.written, found.read) > 0
