"""How numbers are written: in few characters, and never as what they are not."""

import math

import pytest

from bilevel.sinks.numbers import (
    counts,
    duration,
    interval,
    relation,
    relative_error,
    signed,
    significant,
    small,
    spelled,
)


def test_only_known_constants_that_leave_nothing_out_make_a_bound():
    assert relation("known constants") == "≤"
    for source in ("known constants, y taken as solved", "Ritz values", "estimated", None):
        assert relation(source) == "~"


def test_an_error_is_relative_to_the_hypergradient():
    assert relative_error(5e-4, "known constants", 0.25) == "≤2.0e-03"
    assert relative_error(None, "known constants", 0.25) is None
    assert relative_error(5e-4, "known constants", 0.0) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (10.5, "10.5"),
        (9999, "9999"),
        (10_000, "10k"),
        (999_499, "999k"),
        (999_500, "1.0M"),
        (12_345_678, "12M"),
        (9.99e9, "10G"),
        (5e12, "5T"),
    ],
)
def test_each_count_has_four_characters(count, text):
    assert counts(count, 0, 1) == f"{text}/0/1"
    assert len(text) <= 4


def test_counts_are_spelled_out_kind_by_kind():
    assert spelled(1440, 217, 20) == "1,440 gradients, 217 HVPs, 20 cross products"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (3599.6, "1h00m"),
        (7 * 3600 + 125, "7h02m"),
        (100 * 3600, "4d04h"),
    ],
)
def test_a_duration_has_six_characters_at_most(seconds, text):
    assert duration(seconds) == text
    assert len(text) <= 6


def test_an_unknown_number_is_a_dash():
    assert (small(None), small(0.00123), small(0.98, ".3f")) == ("-", "1.2e-03", "0.980")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (0.25, "0.25"),
        (0.123456, "0.1235"),
        (-0.123456, "-0.1235"),
        (0.99996, "1"),
        (12.0, "12"),
        (100.0, "100"),
        (12345.678, "12,346"),
        (9_999_999.0, "9,999,999"),
        (12_345_678.0, "1.235e+07"),
        (1e-4, "0.0001"),
        (9.9e-5, "9.9e-05"),
        (1e-7, "1e-07"),
        (1.2e-300, "1.2e-300"),
        (math.nan, "–"),
        (math.inf, "+∞"),
        (-math.inf, "-∞"),
    ],
)
def test_no_digit_says_nothing(value, text):
    assert significant(value) == text


def test_a_difference_has_its_sign():
    assert [signed(value) for value in (0.5, -0.5, 0.0, math.nan)] == ["+0.5", "-0.5", "0", "–"]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.73456, 0.0123, "0.735 ± 0.012"),
        (0.73456, 0.5, "0.73 ± 0.50"),
        (2.0, 2.4841, "2.0 ± 2.5"),
        (1234.5, 67.8, "1,234 ± 68"),
        (144.2, 1234.0, "144 ± 1,234"),
        (0.0, 0.01, "0.000 ± 0.010"),
        (-206.2, 176.0, "-206 ± 176"),
        (0.5, 0.0, "0.5 ± 0"),
        (0.5, 1e-17, "0.5 ± 0"),  # of rounding
        (0.123456789, 1e-9, "0.123457 ± 1e-09"),
        (1.234e-7, 5.6e-9, "1.234e-07 ± 5.6e-09"),
        (1.234e9, 5.6e7, "1.234e+09 ± 5.6e+07"),
        (0.5, None, "0.5"),
        (0.5, math.nan, "0.5"),
        (math.nan, 1.0, "–"),
    ],
)
def test_an_interval_decides_how_many_digits_its_mean_has(mean, half, text):
    assert interval(mean, half) == text
