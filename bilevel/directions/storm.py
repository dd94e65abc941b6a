"""STORM: momentum with its bias corrected. Cutkosky and Orabona (2019), arXiv:1905.10018.

In bilevel methods: SUSTAIN (arXiv:2102.07367), MRBO (arXiv:2106.04692), FSLA (arXiv:2112.04660).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from bilevel import tree
from bilevel.components import component
from bilevel.directions.quantity import StochasticQuantity
from bilevel.types import Params


@component
class Storm:
    """d_t = q(z_t; ξ_t) + (1 − momentum) (d_{t−1} − q(z_{t−1}; ξ_t)), d_0 = q(z_0; ξ_0).

    E d_t − q(z_t) = (1 − momentum) (E d_{t−1} − q(z_{t−1})): unbiased if it starts so. At
    momentum = 1 the draw itself. 2 evaluations, 1 the first time and at momentum = 1.
    """

    by_block: ClassVar[bool] = False
    momentum: float = Field(default=0.5, gt=0, le=1)

    @property
    def looks_back(self) -> bool:
        return self.momentum < 1

    def take(
        self, draw: StochasticQuantity, memory: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        d = now = draw.now()
        if memory and self.looks_back:
            kept = tree.scale(1 - self.momentum, memory["direction"])
            fresh = tree.scale(self.momentum, now)
            change = tree.sub(now, draw.before())
            d = tree.axpy(1 - self.momentum, change, tree.add(kept, fresh))
        return d, {"direction": d}
