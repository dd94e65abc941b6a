"""Numbers of a step that is recorded, on a tape that writes down what it is told."""

import math
import operator

import pytest

from bilevel.scalars.functions import call, clock, larger, smaller, sqrt
from bilevel.scalars.scalar import Recording, Scalar


class Written:
    """A tape that lists what is called, expected and made plain."""

    def __init__(self):
        self.lines = []

    def call(self, function, *given, **options):
        self.lines.append((function, *given))
        return Scalar(function(*(getattr(g, "value", g) for g in given), **options), None, self)

    def expect(self, function, *given):
        self.lines.append(("expect", function, *given))
        return function(*(getattr(g, "value", g) for g in given))

    def specialise(self, scalar):
        self.lines.append(("plain", scalar))
        return scalar.value


@pytest.fixture
def tape():
    return Written()


def test_it_computes_as_floats_do_and_every_operation_is_noted(tape, monkeypatch):
    monkeypatch.setattr(Recording, "tape", tape)
    a, b = Scalar(3.0, None, tape), Scalar(-2.0, None, tape)
    for found, value in [
        (a + b, 1.0),
        (2 - a, -1.0),
        (a / b, -1.5),
        (2 * a, 6.0),
        (a**2, 9.0),
        (2**a, 8.0),
        (-a, -3.0),
        (abs(b), 2.0),
        (a % 2, 1.0),
        (a // 2, 1.0),
        (sqrt(a), math.sqrt(3)),
        (larger(1.0, a), 3.0),
        (larger(b, 1.0), 1.0),
        (smaller(1.0, a), 1.0),
        (smaller(b, 1.0), -2.0),
        (call(math.hypot, a, 4.0), 5.0),
    ]:
        assert isinstance(found, Scalar)
        assert found.value == value
    assert len(tape.lines) == 16


def test_decisions_are_expectations_and_give_plain_answers(tape):
    a = Scalar(3.0, None, tape)
    assert [a > 2, a < 2, a == 3, a != 3, a >= 2, a <= 2, 1 < a < 4] == [True, False] * 2 + [
        True,
        False,
        True,
    ]
    assert bool(a) is True
    assert {line[0] for line in tape.lines} == {"expect"}


def test_where_it_becomes_a_plain_number_that_is_noted(tape):
    a = Scalar(3, None, tape)
    assert (float(a), int(a), operator.index(a), repr(a), f"{a:d}") == (3.0, 3, 3, "3", "3")
    assert [line[0] for line in tape.lines] == ["plain"] * 5
    with pytest.raises(TypeError):
        hash(a)


def test_without_a_record_they_are_the_functions_of_python():
    assert (sqrt(4.0), larger(1.0, 2.0), smaller(1.0, 2.0), call(math.hypot, 3.0, 4.0)) == (
        2,
        2,
        1,
        5,
    )
    assert Recording.tape is None
    assert clock() <= clock()
