"""Prices that a seller sets and buyers answer, in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class Pricing:
    """Buyers choose y to minimise ½ b ‖y‖² − (a − p)ᵀ y; the seller p to minimise −pᵀ y + ½ ‖p‖².

    y*(p) = (a − p) / b and dΦ/dp = p − (a − 2 p) / b.
    """

    goods: PositiveInt = 3
    satiety: PositiveFloat = 2.0

    def init(self, streams: Streams) -> tuple[Params, Params]:
        price = torch.rand(self.goods, generator=streams["init"], dtype=torch.float64)
        return {"price": price}, {"demand": torch.zeros(self.goods, dtype=torch.float64)}

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return -(x["price"] @ y["demand"]) + 0.5 * x["price"] @ x["price"]

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        worth = batch["appetite"] - x["price"]
        return 0.5 * self.satiety * y["demand"] @ y["demand"] - worth @ y["demand"]

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat(None)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat({"appetite": self._appetite()})

    def lower_solution(self, x: Params) -> Params:
        return {"demand": (self._appetite().to(x["price"]) - x["price"]) / self.satiety}

    def hypergradient(self, x: Params) -> Params:
        price = x["price"]
        return {"price": price - (self._appetite().to(price) - 2 * price) / self.satiety}

    def _appetite(self) -> Tensor:
        return torch.linspace(2, 3, self.goods, dtype=torch.float64)
