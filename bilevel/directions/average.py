"""The moving average of MA-SOBA. Chen, Xiao and Balasubramanian (2023), arXiv:2306.12067."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bilevel import tree
from bilevel.directions.draw import Draw, total
from bilevel.types import Params, component


@component
class Average:
    """d_t = (1 − weight) d_{t−1} + weight q(z_t; ξ_t), d_0 = q(z_0; ξ_0).

    Biased by how far z moved in about 1 / weight iterations; variance about weight / 2 of one
    batch's. 1 evaluation.
    """

    weight: float = Field(default=0.1, gt=0, le=1)

    @property
    def looks_back(self) -> bool:
        return False

    @property
    def by_block(self) -> bool:
        return False

    def take(self, draw: Draw, memory: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        d = total(draw.now())
        if memory:
            kept = tree.scale(1 - self.weight, memory["direction"])
            d = tree.axpy(self.weight, d, kept)
        return d, {"direction": d}
