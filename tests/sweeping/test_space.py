"""What varies, as it is typed: ranges, lists, overrides, and what is none of these."""

import math

import pytest

from bilevel.errors import RecipeError
from bilevel.sweeping.space import Choices, Range, grid_size, parse


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lr=1e-3..1e-1,log", Range("lr", 1e-3, 1e-1, is_log=True)),
        ("lr=-1..2.5", Range("lr", -1.0, 2.5)),
        ("lr=.5...75", Range("lr", 0.5, 0.75)),
        ("lr=1e-3..1e-1,log,5", Range("lr", 1e-3, 1e-1, is_log=True, points=5)),
        ("lower.steps=5..50,int", Range("lower.steps", 5.0, 50.0, is_int=True)),
        ("steps=1..100,int,log", Range("steps", 1.0, 100.0, is_log=True, is_int=True)),
        ("estimator=cg, unroll", Choices("estimator", ("cg", "unroll"))),
        ("e={name: a, b: [1, 2]},x", Choices("e", ("{name: a, b: [1, 2]}", "x"))),
        ("p='a,b',c", Choices("p", ("'a,b'", "c"))),
    ],
)
def test_what_varies(word, found):
    assert parse([word]) == ([found], [])


@pytest.mark.parametrize(
    "word",
    ["upper.steps=50", "sinks=[jsonl, rows]", "seeds=0..4", "seeds=1,2", "p=../x.py:A", "alone"],
)
def test_what_holds_for_every_trial(word):
    assert parse([word]) == ([], [word])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr=1e-1..1e-3", "the smaller end first"),
        ("lr=1..1", "the smaller end first"),
        ("lr=a..b", "finite numbers; got 'a'"),
        ("lr=1..", "finite numbers; got ''"),
        ("lr=0..inf", "finite numbers; got 'inf'"),
        ("lr=nan..1", "finite numbers; got 'nan'"),
        ("=3..4", "names no key"),
        ("=a,b", "names no key"),
        ("lr=0..1,log", "begin above 0"),
        ("lr=-1..1,log", "begin above 0"),
        ("lr=1..2,lgo", "got 'lgo'"),
        ("lr=1..2,5,6", "got '6'"),
        ("lr=1..2,1", "1 points"),
        ("lr=1..2,1000000000", "after a range stand"),
        ("n=1.5..3,int", "must be integers"),
        ("e=a,,b", "a value is empty"),
        ("e=a,b,a", "stands twice"),
        ("e=" + ",".join(map(str, range(1001))), "1,001 values"),
    ],
)
def test_what_is_neither_is_refused(word, said):
    with pytest.raises(RecipeError, match=said):
        parse([word])


def test_a_key_is_varied_once():
    with pytest.raises(RecipeError, match="lr is varied twice"):
        parse(["lr=1..2", "lr=3,4"])


def test_a_grid_has_both_ends_and_even_spaces():
    (log, plain, whole, few), _ = parse(
        ["a=1e-3..1e-1,log,5", "b=-1..1,3", "c=3..6,int", "d=0..10,int,3"]
    )
    ratios = [b / a for a, b in zip(log.grid(), log.grid()[1:], strict=False)]
    assert (log.grid()[0], log.grid()[-1]) == (1e-3, 1e-1)
    assert all(math.isclose(ratio, math.sqrt(10), rel_tol=1e-12) for ratio in ratios)
    assert (plain.grid(), whole.grid(), few.grid()) == ([-1, 0, 1], [3, 4, 5, 6], [0, 5, 10])
    assert grid_size([log, plain, whole, few]) == 5 * 3 * 4 * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=0..1"], "needs a number of points in a range: a=0..1,5"),
        (["a=0..999999999,int"], "1,000,000,000 points; at most 10,000"),
        (["a=0..1,1000", "b=0..1,1000", "c=0..1,1000"], "1,000,000,000 points"),
    ],
)
def test_a_grid_that_has_no_end_is_refused(words, said):
    with pytest.raises(RecipeError, match=said):
        grid_size(parse(words)[0])
