"""How numbers are written: in few characters, and never as what they are not."""

import pytest

from bilevel.sinks.numbers import counts, duration, relation, relative_error, small, spelled


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
