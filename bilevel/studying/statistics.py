"""Differences of two arms over paired seeds, with an interval that knows of seeds and of what was measured on.

The hierarchical bootstrap draws seeds with replacement and, in each that is drawn, its units (pictures) with all
their cases; both arms have the same ones. Percentiles of few seeds are too narrow by the normal distribution
in the place of Student's and by n in the place of n − 1; they are taken as far out as mends that (the expanded
percentile interval: Hesterberg, 2015, doi:10.1080/00031305.2015.1089789, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 10_000
"""Of seeds."""
RESAMPLED = 1000
"""Of the units of each seed, among which the draws of seeds choose."""
FEWEST = 3
"""Seeds below which there is no interval."""
_AT_A_TIME = 2_000_000
"""Numbers of a matrix of weights."""

Floats = NDArray[np.float64]
Verdict = Literal["win", "tie", "loss", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds, and the ends of its interval; None of fewer than three."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Answers:
    """The cases of one run: which unit each is of, its score, and its label where there is one."""

    unit: NDArray[np.int64]
    score: Floats
    label: NDArray[np.bool_] | None

    def measure(self, weights: Floats) -> Floats:
        """[draw] of weights [draw, case]: area under the ROC curve, ties counting half, or the weighted mean.

        NaN where a draw has no case of a label.
        """
        if self.label is None:
            return weights @ self.score / weights.sum(1)
        order = np.argsort(self.score, kind="stable")
        score, label = self.score[order], self.label[order]
        starts = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])
        weights = weights[:, order]
        true = np.add.reduceat(weights * label, starts, axis=1)
        false = np.add.reduceat(weights * ~label, starts, axis=1)
        below = false.cumsum(1) - false / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (true * below).sum(1) / (true.sum(1) * false.sum(1))

    def resampled(self, draws: int, generator: np.random.Generator) -> Floats:
        """[draw]: the measure on units drawn with replacement; those of a generator are the same for every arm."""
        units = int(self.unit.max()) + 1
        size = max(1, _AT_A_TIME // len(self.unit))
        found = []
        for start in range(0, draws, size):
            count = min(size, draws - start)
            times = generator.multinomial(units, np.full(units, 1 / units), size=count)
            found.append(self.measure(times[:, self.unit].astype(float)))
        return np.concatenate(found)


def answers(cases: Any) -> Answers:
    """From the columns that a cell keeps."""
    label = np.array(cases["label"], dtype=bool) if "label" in cases else None
    return Answers(np.array(cases["unit"]), np.array(cases["score"], dtype=float), label)


def interval(
    values: Sequence[float] | Floats, resampled: Sequence[Floats] | None = None
) -> Interval:
    """Of the mean of a value a seed, with the values of each seed on resampled units where there are any.

    The same numbers give the same interval: it has a generator of its own.
    """
    found, n = np.array(values, dtype=float), len(values)
    if n < FEWEST:
        return Interval(float(found.mean()) if n else float("nan"), None, None, n)
    generator = np.random.default_rng(0)
    seeds = generator.integers(n, size=(DRAWS, n))
    if resampled is None:
        drawn = found[seeds]
    else:
        each = np.stack(resampled)
        drawn = each[seeds, generator.integers(each.shape[1], size=seeds.shape)]
    low, high = np.nanquantile(drawn.mean(1), ends(n))
    return Interval(float(found.mean()), float(low), float(high), n)


def ends(n: int, level: float = LEVEL) -> tuple[float, float]:
    """The percentiles, as shares, that an interval of this level takes with n seeds: Φ(± t_{n−1} √(n / (n − 1)))."""
    from scipy.special import ndtr, stdtrit

    out = float(ndtr(stdtrit(n - 1, (1 - level) / 2) * (n / (n - 1)) ** 0.5))
    return out, 1 - out


def verdict(found: Interval, margin: float, maximize: bool) -> Verdict:
    """What an interval of a difference says: tie within ± margin, else win or loss beside 0, else undecided."""
    low, high = found.low, found.high
    if low is None or high is None:
        return "undecided"
    if -margin <= low and high <= margin:
        return "tie"
    if low > 0 or high < 0:
        return "win" if (low > 0) == maximize else "loss"
    return "undecided"
