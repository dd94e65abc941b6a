"""The quadratic bilevel problem in closed form: any dimension, any conditioning.

    G(x, y) = ½ yᵀ A y − yᵀ (B x + c),    y*(x) = A⁻¹ (B x + c)
    F(x, y) = ½ ‖y − t‖² + ½ ρ ‖x − s‖² + yᵀ D x

A is symmetric positive definite with eigenvalues log-spaced from 1 / condition to 1; nothing is
centred at zero, and F depends on x directly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class Quadratic:
    """½ ‖y*(x) − t‖² + ½ ρ ‖x − s‖² + y*ᵀDx over a strongly convex quadratic lower level."""

    num_upper: PositiveInt = 5
    num_lower: PositiveInt = 10
    condition: float = Field(default=10.0, ge=1)
    rho: PositiveFloat = 0.1
    data_seed: int = 0

    @cached_property
    def constants(self) -> Params:
        """A, B, c, D, s, t in float64."""
        n, m = self.num_upper, self.num_lower
        stream = rng.stream(self.data_seed, "quadratic")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        Q = torch.linalg.qr(draw(m, m)).Q
        spectrum = torch.logspace(0, 1, m, base=1 / self.condition, dtype=torch.float64)
        return {
            "A": Q @ spectrum.diag() @ Q.T,
            "B": draw(m, n) / m**0.5,
            "c": draw(m) + 1,
            "D": draw(m, n) / (m * n) ** 0.5,
            "s": draw(n) - 2,
            "t": draw(m) + 3,
        }

    def init(self, streams: Streams) -> tuple[Params, Params]:
        stream = streams["init"]
        x = torch.randn(self.num_upper, generator=stream, dtype=torch.float64)
        y = torch.randn(self.num_lower, generator=stream, dtype=torch.float64)
        return {"x": x + 1}, {"y": y}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        off, far = y["y"] - batch["t"], x["x"] - batch["s"]
        return 0.5 * off @ off + 0.5 * self.rho * far @ far + y["y"] @ (batch["D"] @ x["x"])

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        linear = batch["B"] @ x["x"] + batch["c"]
        return 0.5 * y["y"] @ (batch["A"] @ y["y"]) - y["y"] @ linear

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.constants)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.constants)

    def lower_solution(self, x: Params) -> Params:
        """A⁻¹ (B x + c)."""
        k = self._like(x)
        return self._cast(y=torch.linalg.solve(k["A"], k["B"] @ x["x"].double() + k["c"]), like=x)

    def hypergradient(self, x: Params) -> Params:
        """ρ (x − s) + Dᵀ y* + Bᵀ A⁻¹ (y* − t + D x)."""
        k, at = self._like(x), x["x"].double()
        y = torch.linalg.solve(k["A"], k["B"] @ at + k["c"])
        v = torch.linalg.solve(k["A"], y - k["t"] + k["D"] @ at)
        return self._cast(x=self.rho * (at - k["s"]) + k["D"].T @ y + k["B"].T @ v, like=x)

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        solution = self.lower_solution(x)
        gradient = self.hypergradient(x)["x"]
        return {
            "upper value": float(
                self.upper_loss(x, solution, tree.to(self.constants, x["x"].device, x["x"].dtype))
            ),
            "hypergradient norm": float(gradient.norm()),
            "distance to y*": float((y["y"] - solution["y"]).norm()),
        }

    def _like(self, x: Params) -> Params:
        """The constants where x is, in float64: torch factorises nothing in 16 bits."""
        return {name: value.to(x["x"].device) for name, value in self.constants.items()}

    def _cast(self, *, like: Params, **values: Tensor) -> Params:
        return {name: value.to(like["x"].dtype) for name, value in values.items()}
