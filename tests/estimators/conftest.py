"""Fixtures of this folder."""

import pytest

from tests.cases import PROBLEMS, closed_form, offset
from tests.estimators.typed_out import Typed


@pytest.fixture
def here():
    """(a quadratic case, y off its solution, the derivatives typed out)"""
    case = closed_form(PROBLEMS[0], 1)
    start = offset(case.y, 1.0)
    return case, start, Typed(case)
