"""Nested values taken apart and put together."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from bilevel.replay.layout import GIVEN, MOST, given_leaves, rebuilder, taker
from bilevel.scalars.table import RowTable


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


class Two(NamedTuple):
    left: Any
    right: Any


def test_tensors_and_numbers_are_leaves_and_the_rest_is_layout():
    x = torch.zeros(2)
    value = {"x": x, "n": 3, "deep": [Pair(0.5, "s"), (None, True)], "two": Two(x, 1.0)}
    leaves = taker(value)(value)
    assert [type(leaf) for leaf in leaves] == [torch.Tensor, int, float, torch.Tensor, float]
    assert all(a is b for a, b in zip(leaves, given_leaves(value), strict=True))


X = torch.zeros(2, 3)
ROWS = RowTable({"1": {"y": X[0]}}, {"y": X[0]})


@pytest.mark.parametrize("many", [0, MOST + 1], ids=["with code", "large"])
def test_layouts_differ_where_one_record_does_not_serve_both(many):
    rest = {"rest": [0] * many, "pair": Pair(ROWS, Two(X, np.zeros(2))), "s": "s"}
    like = {"x": X, "n": 3, **rest}
    rest = {
        **rest,
        "pair": Pair(ROWS, Two(X, rest["pair"].right.right)),
    }  # an array is itself alone
    take = taker(like)
    another = {"x": X + 1, "n": 4, **rest}
    if not many:  # in another order
        another = {**rest, **another}
    assert [*map(id, take(another))] == [
        *map(id, given_leaves({"x": another["x"], "n": 4, **rest}))
    ]
    others = [
        {"x": X.T, "n": 3, **rest},
        {"x": X, "n": 3.0, **rest},
        {"x": X, "n": "3", **rest},
        {"x": X, **rest},
        {"x": [X], "n": 3, **rest},
        {"x": X.double(), "n": 3, **rest},
        {"x": X.clone().requires_grad_(), "n": 3, **rest},
        {"x": X, "n": True, **rest},
        {"x": X, "n": 3, **rest, "s": "t"},
        {"x": X, "n": 3, **rest, "rest": [0] * (many + 1)},
        {"x": X, "n": 3, **rest, "pair": SimpleNamespace(left=ROWS, right=Two(X, None))},
        {"x": X, "n": 3, **rest, "pair": Pair(ROWS, Two(X[:1], None))},
        {"x": X, "n": 3, **rest, "pair": Pair(RowTable({}, {"y": X}), rest["pair"].right)},
    ]
    assert not [other for other in others if take(other) is not None]


def test_what_is_rebuilt_has_what_is_given_and_shares_the_rest():
    constant = {"kept": [1, 2]}
    like = Pair({"a": GIVEN, "b": constant}, [(GIVEN, "s"), Two(GIVEN, None)])
    made = rebuilder(like)([1, 2, 3])
    assert made == Pair({"a": 1, "b": constant}, [(2, "s"), Two(3, None)])
    assert made.left["b"] is constant
    assert like.left["a"] is GIVEN
    assert rebuilder(constant)([]) is constant
