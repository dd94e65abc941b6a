"""The benchmark of batched tasks runs, at toy size; the ratio itself is no test."""

from bilevel.estimators.unroll import Unroll
from tests.benchmarks.batched import ratio


def test_it_measures():
    assert ratio(2, Unroll(), repetitions=1) > 0
