"""Means over seeds with a 95 % interval: numbers, and curves over upper steps or oracle calls."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95

Curve = Sequence[tuple[float, float]]
"""(upper step or oracle calls, value), in order."""


@dataclass(frozen=True)
class Mean:
    """mean ± half over n values: the interval of Student's t, for values that are normal around it.

    No interval of one value: `half` is None.
    """

    mean: float
    half: float | None
    n: int


def mean(values: Sequence[float]) -> Mean:
    """mean ± t s / √n with s² = Σ (value − mean)² / (n − 1); of no value NaN."""
    n = len(values)
    if not n:
        return Mean(math.nan, None, 0)
    try:
        middle = math.fsum(values) / n
    except OverflowError:  # of losses that diverged
        middle = math.fsum(value / n for value in values)
    if n == 1:
        return Mean(middle, None, 1)
    spread = math.hypot(*(value - middle for value in values)) / math.sqrt(n - 1)
    return Mean(middle, _t(n - 1) * spread / math.sqrt(n), n)


def over_steps(curves: Sequence[Curve]) -> list[tuple[float, Mean]]:
    """The mean at each step at which every curve has a value."""
    values = [dict(curve) for curve in curves]
    shared = set.intersection(*(set(each) for each in values)) if values else set()
    return [(step, mean([each[step] for each in values])) for step in sorted(shared)]


def over_calls(curves: Sequence[Curve]) -> list[tuple[float, Mean]]:
    """The mean of what each curve has reached with so many calls: its last value at or before them.

    From where all have begun to where the first one ends, at the calls of the first curve.
    """
    if not curves or not all(curves):
        return []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    at = [x for x, _ in curves[0] if first <= x <= last]
    at = sorted({first, last, *at}) if first <= last else []
    positions = [[x for x, _ in curve] for curve in curves]

    def reached(each: int, calls: float) -> float:
        return curves[each][bisect.bisect_right(positions[each], calls) - 1][1]

    return [(calls, mean([reached(each, calls) for each in range(len(curves))])) for calls in at]


def thinned(points: Sequence[tuple[float, Mean]], most: int) -> list[tuple[float, Mean]]:
    """At most about so many of the points, evenly, the last one among them."""
    chosen = list(points[:: max(1, math.ceil(len(points) / most))])
    return chosen if chosen[-1:] == list(points[-1:]) else [*chosen, points[-1]]


@lru_cache
def _t(degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))
