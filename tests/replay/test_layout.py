"""Nested values taken apart and put together."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bilevel.replay.layout import GIVEN, rebuilder, spread


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Two(NamedTuple):
    left: Any
    right: Any


def layout(value):
    return spread(value, [])


def test_tensors_and_numbers_are_leaves_and_the_rest_is_layout():
    leaves = []
    x = torch.zeros(2)
    spread({"x": x, "n": 3, "deep": [Pair(0.5, "s"), (None, True)], "two": Two(x, 1.0)}, leaves)
    assert [type(leaf) for leaf in leaves] == [torch.Tensor, int, float, torch.Tensor, float]


def test_layouts_differ_where_one_record_does_not_serve_both():
    x = torch.zeros(2, 3)
    same = [{"x": x, "n": 3}, {"x": x + 1, "n": 4}]
    assert layout(same[0]) == layout(same[1])
    others = [
        {"x": x.T, "n": 3},
        {"x": x, "n": 3.0},
        {"x": x, "n": "3"},
        {"x": x},
        {"x": [x], "n": 3},
    ]
    others += [
        {"x": x.double(), "n": 3},
        {"x": x.clone().requires_grad_(), "n": 3},
        {"x": x, "n": True},
    ]
    assert not [other for other in others if layout(other) == layout(same[0])]


def test_what_is_rebuilt_has_what_is_given_and_shares_the_rest():
    constant = {"kept": [1, 2]}
    like = Pair({"a": GIVEN, "b": constant}, [(GIVEN, "s"), Two(GIVEN, None)])
    make = rebuilder(like)
    assert make is not None
    made = make(iter([1, 2, 3]))
    assert made == Pair({"a": 1, "b": constant}, [(2, "s"), Two(3, None)])
    assert made.left["b"] is constant
    assert like.left["a"] is GIVEN
    assert rebuilder(constant) is None
