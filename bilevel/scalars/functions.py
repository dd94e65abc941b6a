"""Functions of numbers that may be scalars of a step that is recorded, and else are those of Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from bilevel.scalars.scalar import Recording, Scalar


def sqrt(a: float) -> float:
    """√a."""
    return a.tape.call(math.sqrt, a) if isinstance(a, Scalar) else math.sqrt(a)


def larger(a: float, b: float) -> float:
    """max(a, b)."""
    if isinstance(a, Scalar):
        return a.tape.call(max, a, b)
    return b.tape.call(max, a, b) if isinstance(b, Scalar) else max(a, b)


def smaller(a: float, b: float) -> float:
    """min(a, b)."""
    if isinstance(a, Scalar):
        return a.tape.call(min, a, b)
    return b.tape.call(min, a, b) if isinstance(b, Scalar) else min(a, b)


def call(function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), one operation of a record: of numbers and of tensors that no derivative is taken of.

    It gives tensors or numbers, the same ones for the same: what it draws is of a stream that it makes.
    """
    return function(*given) if Recording.tape is None else Recording.tape.call(function, *given)


def gathered(draws: Any, function: Callable[..., Any], *given: Any) -> Any:
    """function(draws, *given), which draws as many batches as it wants, and computes nothing of them.

    A replay calls it again, where it would else have to draw the same number of them.
    """
    gather = None if Recording.tape is None else getattr(draws, "gather", None)
    return function(draws, *given) if gather is None else gather(function, *given)


def clock() -> float:
    """Seconds, for differences."""
    return time.perf_counter() if Recording.tape is None else Recording.tape.call(time.perf_counter)
