"""A quadratic lower level in a box: some of y rests on the bounds, the rest is free; closed form.

    G(x, y) = ½ yᵀ A y − yᵀ (B x + c)  over  |yᵢ| ≤ bound
    F(x, y) = ½ ‖y − t‖² + ½ ρ ‖x − s‖²

On the free entries f, A_ff y_f = (B x + c)_f − A_fb y_b. The same set is given as a projection and
as constraints.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params


@component
class BoxQP:
    """½ ‖y*(x) − t‖² + ½ ρ ‖x − s‖² over a strongly convex quadratic lower level in a box."""

    num_upper: PositiveInt = 5
    num_lower: PositiveInt = 10
    condition: float = Field(default=10.0, ge=1)
    bound: PositiveFloat = 1.0
    rho: PositiveFloat = 0.1
    data_seed: int = 0

    @cached_property
    def constants(self) -> Params:
        """A, B, c, s, t in float64."""
        n, m = self.num_upper, self.num_lower
        stream = rng.stream(self.data_seed, "box_qp")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        Q = torch.linalg.qr(draw(m, m)).Q
        spectrum = torch.logspace(0, 1, m, base=1 / self.condition, dtype=torch.float64)
        A = Q @ spectrum.diag() @ Q.T
        return {
            "A": A,
            "B": 0.2 * A @ draw(m, n),
            "c": A @ draw(m),
            "s": draw(n) - 2,
            "t": draw(m) + 3,
        }

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x = torch.randn(self.num_upper, generator=streams["init"], dtype=torch.float64)
        return {"x": x}, {"y": torch.zeros(self.num_lower, dtype=torch.float64)}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        off, far = y["y"] - batch["t"], x["x"] - batch["s"]
        return 0.5 * off @ off + 0.5 * self.rho * far @ far

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        linear = batch["B"] @ x["x"] + batch["c"]
        return 0.5 * y["y"] @ (batch["A"] @ y["y"]) - y["y"] @ linear

    def project_lower(self, y: Params) -> Params:
        return {"y": y["y"].clamp(-self.bound, self.bound)}

    def lower_constraints(self, x: Params, y: Params, batch: Params) -> Params:
        """y − bound ≤ 0 and −y − bound ≤ 0."""
        return {"inequality": torch.cat([y["y"], -y["y"]]) - self.bound}

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.constants)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.constants)

    def lower_solution(self, x: Params) -> Params:
        """Projected gradient steps find which bounds are active; the rest solves A_ff."""
        y, _ = self._solve(x)
        return {"y": y.to(x["x"].dtype)}

    def hypergradient(self, x: Params) -> Params:
        """ρ (x − s) + B_fᵀ A_ff⁻¹ (y* − t)_f, f the free entries."""
        k, (y, free) = self._like(x), self._solve(x)
        v = torch.linalg.solve(k["A"][free][:, free], (y - k["t"])[free])
        h = self.rho * (x["x"].double() - k["s"]) + k["B"][free].T @ v
        return {"x": h.to(x["x"].dtype)}

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        solution = self.lower_solution(x)["y"]
        return {
            "active bounds": float((solution.abs() >= self.bound).sum()),
            "hypergradient norm": float(self.hypergradient(x)["x"].norm()),
            "distance to y*": float((y["y"] - solution).norm()),
        }

    def _solve(self, x: Params) -> tuple[Tensor, Tensor]:
        """(y*, which entries are free), in float64."""
        k = self._like(x)
        A, linear = k["A"], k["B"] @ x["x"].double() + k["c"]
        y = torch.zeros_like(linear)
        for _ in range(int(40 * self.condition)):  # the largest eigenvalue is 1
            y = (y - (A @ y - linear)).clamp(-self.bound, self.bound)
        free = y.abs() < self.bound
        held = torch.where(free, 0.0, y)
        y = held.clone()
        y[free] = torch.linalg.solve(A[free][:, free], (linear - A @ held)[free])
        return y, free

    def _like(self, x: Params) -> Params:
        """The constants where x is, in float64."""
        return {name: value.to(x["x"].device) for name, value in self.constants.items()}
