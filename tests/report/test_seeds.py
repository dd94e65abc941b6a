"""Means over seeds: by hand, and against scipy's own interval."""

import math

import pytest
from scipy import stats

from bilevel.report import seeds


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0, 9.0]
    found = seeds.mean(values)
    low, high = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    assert found.n == 4
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), 1e-12)


def test_it_is_wider_than_that_of_a_normal_distribution():  # negative control
    half = seeds.mean([1.0, 2.0, 4.0, 9.0]).half
    assert half is not None
    assert half > 1.5 * 1.96 * stats.sem([1.0, 2.0, 4.0, 9.0])


def test_two_values_by_hand():
    """t(1; 0.975) = tan(0.475 π) = 12.706; s/√2 = |a − b| / 2."""
    found = seeds.mean([3.0, 5.0])
    assert found.mean == 4.0
    assert found.half == pytest.approx(math.tan(0.475 * math.pi), 1e-12)


def test_one_value_has_no_interval_and_none_is_nan():
    assert seeds.mean([2.5]) == seeds.Mean(2.5, None, 1)
    assert math.isnan(seeds.mean([]).mean)
    assert seeds.mean([2.5, 2.5]).half == 0.0


def test_over_steps_only_where_every_curve_has_a_value():
    found = seeds.over_steps([[(1, 1.0), (2, 2.0), (3, 3.0)], [(1, 3.0), (3, 5.0), (4, 9.0)]])
    assert [(step, each.mean) for step, each in found] == [(1, 2.0), (3, 4.0)]
    assert seeds.over_steps([]) == []


def test_over_calls_each_curve_counts_with_what_it_has_reached():
    first = [(0.0, 10.0), (10.0, 8.0), (20.0, 6.0)]
    second = [(5.0, 4.0), (15.0, 2.0)]
    found = seeds.over_calls([first, second])
    # from 5, where both have begun, to 15, where the second one ends
    assert [(x, each.mean) for x, each in found] == [(5.0, 7.0), (10.0, 6.0), (15.0, 5.0)]
    assert seeds.over_calls([first, []]) == []
    assert seeds.over_calls([[(0.0, 1.0)], [(5.0, 1.0)]]) == []


def test_thinned_curves_keep_their_last_point():
    points = [(float(x), seeds.Mean(x, None, 1)) for x in range(1001)]
    assert [x for x, _ in seeds.thinned(points, 3)] == [0.0, 334.0, 668.0, 1000.0]
    assert seeds.thinned(points[:2], 3) == points[:2]
    assert seeds.thinned([], 3) == []


def test_no_number_is_too_large():
    found = seeds.mean([1.5e308, 1.7e308])
    assert found.mean == pytest.approx(1.6e308)
    assert found.half is not None
    assert math.isinf(found.half) or found.half > 1e307
