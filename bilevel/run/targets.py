"""What a run may watch of its problem's measures."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from bilevel.components import component


@component
class EarlyStop:
    """End the run after `patience` evaluations in a row in which a measure has gained nothing."""

    measure: str
    """One of those that the problem's `evaluate` returns."""
    mode: Literal["max", "min"]
    """Whether more of it is better, or less."""
    patience: PositiveInt
    min_delta: NonNegativeFloat = 0.0
    """Gains up to this count for nothing."""


@component
class Best:
    """Keep the checkpoint at which a measure was best; of equal ones the first."""

    measure: str
    """One of those that the problem's `evaluate` returns."""
    mode: Literal["max", "min"]
    """Whether more of it is better, or less."""
