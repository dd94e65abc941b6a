"""The upper level: how many steps, by which optimizer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from bilevel.components import Slot, component
from bilevel.optimizers.differentiable import Adam
from bilevel.types import Optimizer


@component
class Upper:
    """`steps` steps of an optimizer along the hypergradient, each followed by `project_upper`."""

    steps: PositiveInt = 100
    optimizer: Annotated[Optimizer, Slot("optimizers")] = Field(
        default_factory=lambda: Adam(lr=1e-2)
    )
