"""The moving average of MA-SOBA. Chen, Xiao and Balasubramanian (2023), arXiv:2306.12067."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from bilevel import tree
from bilevel.components import component
from bilevel.directions.quantity import StochasticQuantity
from bilevel.types import Params


@component
class Average:
    """d_t = h_t, h_t = (1 − weight) h_{t−1} + weight q(z_t; ξ_t), h_0 = q(z_0; ξ_0).

    Biased by how far z moved in about 1 / weight iterations; variance about weight / 2 of one
    batch's. 1 evaluation. `lagged` moves along the average as it was before the present draw
    entered, d_t = h_{t−1}, as MA-SOBA does: given the past, d_t is then no random quantity; it is
    one iteration older. d_0 = h_0 all the same.
    """

    by_block: ClassVar[bool] = False
    weight: float = Field(default=0.1, gt=0, le=1)
    lagged: bool = False

    @property
    def looks_back(self) -> bool:
        return False

    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        now = draw.now()
        if not memory:
            return now, {"direction": now}
        last = memory["direction"]
        d = tree.axpy(self.weight, now, tree.scale(1 - self.weight, last))
        return last if self.lagged else d, {"direction": d}
