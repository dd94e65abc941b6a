"""SPIDER (SARAH): differences added up from a full pass. Fang, Li, Lin and Zhang (2018), NeurIPS.

In bilevel methods: VRBO (arXiv:2106.04692), SRBA (arXiv:2302.08766).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PositiveInt

from bilevel import tree
from bilevel.components import component
from bilevel.directions.quantity import StochasticQuantity
from bilevel.types import Params


@component
class Spider:
    """d_t = d_{t−1} + q(z_t; ξ_t) − q(z_{t−1}; ξ_t); every `period` times the full q(z_t) instead.

    Exact at the full pass, and for as long as z does not move. 2 evaluations, and one for every
    block of data at the full pass. Raises `ProblemError` where batches name no block.
    """

    by_block: ClassVar[bool] = True
    period: PositiveInt = 64

    @property
    def looks_back(self) -> bool:
        return self.period > 1

    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        age = memory.get("age", 0)
        if age:
            d = tree.add(memory["direction"], tree.sub(draw.now(), draw.before()))
        else:
            d = draw.full()
        return d, {"direction": d, "age": (age + 1) % self.period}
