"""How the numbers of a run are written, the same in the console, the tables and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")

COUNTS = "grad/HVP/cross"
"""The head over `counts`: gradients, HVPs and cross products."""

ROUNDING = 1e-12
"""An interval that is narrower, relative to the mean, is one of rounding."""


def relation(source: str | None) -> str:
    """What stands between the error of h and `Stats.error_bound`, by its `error_bound_from`.

    "≤" where it is a bound of the whole error; "~" where it is an estimate, which the error may
    exceed: its constants are estimated, or something, such as the error of y, is left out.
    """
    from bilevel.types import KNOWN_CONSTANTS  # which imports torch

    return "≤" if source == KNOWN_CONSTANTS else "~"


def relative_error(bound: float | None, source: str | None, norm: float) -> str | None:
    """`Stats.error_bound` in units of ‖h‖, "≤2.0e-03"; None where there is none."""
    if bound is None or not norm:
        return None
    return f"{relation(source)}{bound / norm:.1e}"


def small(value: float | None, form: str = ".1e") -> str:
    """A number, "-" for None."""
    return "-" if value is None else format(value, form)


def counts(gradients: float, hvps: float, cross_products: float) -> str:
    """Oracle calls, kind by kind, each in four characters at most: 440/217/20, 12M/99k/1."""
    return "/".join(_short(count) for count in (gradients, hvps, cross_products))


def _short(count: float) -> str:
    if count < 10_000:
        return f"{count:.4g}"
    for unit in "kMG":
        count /= 1000
        if count < 999.5:
            return f"{count:.1f}{unit}" if count < 9.95 else f"{count:.0f}{unit}"
    return f"{count / 1000:.0f}T"


def spelled(gradients: float, hvps: float, cross_products: float) -> str:
    """Oracle calls in words: 440 gradients, 217 HVPs, 20 cross products."""
    return f"{gradients:,.0f} gradients, {hvps:,.0f} HVPs, {cross_products:,.0f} cross products"


def duration(seconds: float) -> str:
    """In six characters at most: 0.4s, 59s, 12m03s, 3h07m, 12d05h."""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 100 else f"{hours // 24}d{hours % 24:02d}h"


def significant(value: float, digits: int = 4) -> str:
    """To so many digits without zeros that say nothing: 0.1234, 12,346, 1.2e-07; – for NaN.

    A power of ten is written below 1e-4 and from 1e7 on.
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else f"{value:+}".replace("inf", "∞")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_bare(mantissa)}e{exponent}"
    return _bare(f"{value:,.{max(0, digits - 1 - _magnitude(value))}f}")


def signed(value: float) -> str:
    """As `significant`, with a plus where it is above 0."""
    return f"+{significant(value)}" if value > 0 and math.isfinite(value) else significant(value)


def interval(mean: float, half: float | None) -> str:
    """`0.734 ± 0.012`: both to the second digit of what is behind ±; the mean alone without it."""
    if half is None or not math.isfinite(mean) or not math.isfinite(half):
        return significant(mean)
    if half <= ROUNDING * abs(mean):
        return f"{significant(mean)} ± 0"
    decimals = 1 - _magnitude(half)
    size = max(abs(mean), half)
    if decimals > 5 - _magnitude(size):  # so narrow that the digits of the mean would be many
        return f"{significant(mean, 6)} ± {significant(half, 2)}"
    if not 1e-4 <= size < 1e7:
        digits = max(2, decimals + _magnitude(size) + 1)
        return f"{significant(mean, digits)} ± {significant(half, 2)}"
    decimals = max(0, decimals)
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}"


def at_end(metrics: Mapping[str, V], at: int, end: int) -> tuple[str, Mapping[str, V]]:
    """The column of measures that were last taken at step `at` of a run that ended at `end`: (head, measures).

    Those of step 0 stand under "before" alone.
    """
    if not at:
        return "after", {}
    return ("after" if at == end else f"at step {at:,}"), metrics


def dated(text: str, at: int | None, end: int) -> str:
    """A measure with the step at which it was taken, where that is not the one that the run ended at."""
    return text if at in (None, end) else f"{text} at step {at:,}"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit."""
    return math.floor(math.log10(abs(value)))


def _bare(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
