"""Whether a dtype resolves the differences that a method takes.

A number is rounded by eps of itself: 1e-7 in float32, 8e-3 in bfloat16, 1e-3 in float16. Where a
method subtracts two numbers that are nearly the same, what is left of them holds that rounding many
times over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.types import Estimator, Params

SHARE = 0.1
"""The part of a difference that rounding may be. At it the errors measured were 5 to 20 %."""

STEP = 3.0
"""How many times eps ‖y‖ a step in y has to be. At it the errors measured were 1 to 10 %."""


def require_resolved(estimator: Estimator, dtypes: Iterable[torch.dtype]) -> None:
    """Raise `ProblemError` where what the estimator subtracts is lost in rounding in these dtypes."""
    needs = estimator.needs
    if needs.rounding_amplification * torch.finfo(torch.bfloat16).eps <= SHARE:
        return  # in no dtype
    coarsest = max(dtypes, key=_eps, default=torch.float64)
    expected = needs.rounding_amplification * _eps(coarsest)
    if expected > SHARE:
        raise ProblemError(
            f"{type(estimator).__name__} amplifies rounding {needs.rounding_amplification:.3g} times, and in "
            f"{_name(coarsest)} an error of {100 * expected:.2g} % comes of that; use "
            f"{needs.rounding_remedy} by a factor of {_up(expected / SHARE):g} or more{_or_wider(coarsest)}"
        )


def require_step(name: str, step: float, y: Params) -> None:
    """Raise `ProblemError` where a step of this length cannot be told from the rounding of y."""
    coarsest = max((entry.dtype for entry in y.values()), key=_eps)
    least = STEP * _eps(coarsest) * tree.norm(y)
    if step < least:
        raise ProblemError(
            f"{name} takes a difference over epsilon = {step:.3g} in y, and in {_name(coarsest)} a "
            f"y of length {tree.norm(y):.3g} is rounded by about as much; use epsilon = "
            f"{_up(least):g} or more{_or_wider(coarsest)}"
        )


def _or_wider(dtype: torch.dtype) -> str:
    """The next wider dtype as a remedy; nothing where there is none."""
    wider = {2: "float32", 4: "float64"}.get(dtype.itemsize)
    return f", or a wider dtype (runtime.dtype: {wider})" if wider else ""


def _up(value: float) -> float:
    """Rounded up to two digits, so that what is said to be enough is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
