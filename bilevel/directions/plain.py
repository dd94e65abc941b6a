"""The draw itself: stochastic gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar

from bilevel.components import component
from bilevel.directions.quantity import StochasticQuantity
from bilevel.types import Params


@component
class Plain:
    """d_t = q(z_t; ξ_t). Unbiased; variance as one batch has it. 1 evaluation."""

    by_block: ClassVar[bool] = False

    @property
    def looks_back(self) -> bool:
        return False

    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        return draw.now(), memory
