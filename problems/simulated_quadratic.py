"""Averages of random quadratics: the simulated problem on which stochastic methods are compared.

    G(x, y) = mean over i < n of ½ yᵀ A_i y + ½ xᵀ P_i x + xᵀ C_i y + a_iᵀ y + p_iᵀ x

and F likewise over j < m. After the "quadratic" data set of the public benchmark of bilevel
solvers, benchopt/benchmark_bilevel (Dagréou et al., arXiv:2201.13409 and arXiv:2302.08766):
A_i = u uᵀ with u normal of a covariance with eigenvalues log-spaced in [0.1, 1], C_i with mean of
singular values `cross`. It differs in what it draws: P_i has no zero eigenvalue, so that Φ is
strongly convex, and the linear terms have a mean of order 1, so that nothing is centred at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from bilevel import rng
from bilevel.components import component
from bilevel.rng import Streams
from bilevel.types import Params

SMALLEST = 0.1
"""Eigenvalue of the mean Hessians, before sampling."""


@component
class SimulatedQuadratic:
    """F and G averages over random quadratics; a batch is one of the blocks of `batch_size` samples.

    Blocks are drawn evenly, with replacement, and carry "block" and "blocks". Without a
    `batch_size` the whole is one block and the problem deterministic, with closed forms.
    `batch_size` has to divide both numbers of samples.
    """

    num_upper: PositiveInt = 5
    num_lower: PositiveInt = 20
    upper_samples: PositiveInt = 512
    lower_samples: PositiveInt = 4096
    batch_size: PositiveInt | None = None
    cross: PositiveFloat = 0.1
    data_seed: int = 0

    @model_validator(mode="after")
    def _blocks_are_equal(self) -> Self:
        for samples in (self.upper_samples, self.lower_samples):
            if self.batch_size and samples % self.batch_size:
                raise ValueError(f"batch_size must divide {samples}, got {self.batch_size}")
        return self

    @cached_property
    def upper(self) -> Params:
        """The coefficients of F, a row for each block, in float64."""
        return self._blocks("upper", self.upper_samples)

    @cached_property
    def lower(self) -> Params:
        """The coefficients of G, a row for each block, in float64."""
        return self._blocks("lower", self.lower_samples)

    def _blocks(self, level: str, samples: int) -> Params:
        stream = rng.stream(self.data_seed, f"simulated_quadratic.{level}")
        n, m = self.num_upper, self.num_lower

        def draw(size: int) -> Tensor:
            return torch.randn(samples, size, generator=stream, dtype=torch.float64)

        u, w, shared = draw(m) @ _root(m, stream), draw(n) @ _root(n, stream), draw(m)
        across = self.cross * _orthogonal(n, stream) @ torch.eye(n, m, dtype=torch.float64)
        means = torch.randn(m + n, generator=stream, dtype=torch.float64).split([m, n])
        found = {
            "yy": _outer(u, u),
            "xx": _outer(w, w),
            "xy": _outer(shared @ across.T, shared @ _orthogonal(m, stream)),
            "y": draw(m) + means[0],
            "x": draw(n) + means[1],
        }
        size = self.batch_size or samples
        return {k: v.view(-1, size, *v.shape[1:]).mean(1) for k, v in found.items()}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        stream = streams["init"]
        x = torch.randn(self.num_upper, generator=stream, dtype=torch.float64)
        y = torch.randn(self.num_lower, generator=stream, dtype=torch.float64)
        return {"x": x}, {"y": y}

    def upper_loss(self, x: Params, y: Params, batch: dict[str, Any]) -> Tensor:
        return _quadratic(x["x"], y["y"], batch)

    def lower_loss(self, x: Params, y: Params, batch: dict[str, Any]) -> Tensor:
        return _quadratic(x["x"], y["y"], batch)

    def upper_batches(self, stream: torch.Generator) -> Iterator[dict[str, Any]]:
        return _drawn(self.upper, stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[dict[str, Any]]:
        return _drawn(self.lower, stream)

    @property
    def lower_solution(self) -> Callable[[Params], Params]:
        """x ↦ y*(x) of the whole; absent where there are batches, whose solutions are others."""
        return self._of_the_whole(self._solution)

    @property
    def hypergradient(self) -> Callable[[Params], Params]:
        """x ↦ dΦ/dx of the whole; absent where there are batches."""
        return self._of_the_whole(self._slope)

    def _of_the_whole(self, closed: Callable[[Params], Params]) -> Callable[[Params], Params]:
        if self.batch_size:
            raise AttributeError("the closed forms are those of the whole: batch_size: null")
        return closed

    def _solution(self, x: Params) -> Params:
        """−A⁻¹ (Cᵀ x + a) of the means."""
        G, at = _mean(self.lower, x), x["x"].double()
        return {"y": -torch.linalg.solve(G["yy"], at @ G["xy"] + G["y"]).to(x["x"].dtype)}

    def _slope(self, x: Params) -> Params:
        """∇x F − C A⁻¹ ∇y F of the means at the lower solution."""
        F, G, at = _mean(self.upper, x), _mean(self.lower, x), x["x"].double()
        y = -torch.linalg.solve(G["yy"], at @ G["xy"] + G["y"])
        v = torch.linalg.solve(G["yy"], F["yy"] @ y + at @ F["xy"] + F["y"])
        h = F["xx"] @ at + F["xy"] @ y + F["x"] - G["xy"] @ v
        return {"x": h.to(x["x"].dtype)}

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        """Of the whole, whatever the batches."""
        h, off = self._slope(x)["x"].double(), y["y"] - self._solution(x)["y"]
        return {"squared hypergradient norm": float(h @ h), "distance to y*": float(off.norm())}


def _quadratic(x: Tensor, y: Tensor, k: dict[str, Any]) -> Tensor:
    of_y = y @ (0.5 * k["yy"] @ y + x @ k["xy"] + k["y"])
    return of_y + x @ (0.5 * k["xx"] @ x + k["x"])


def _drawn(blocks: Params, stream: torch.Generator) -> Iterator[dict[str, Any]]:
    count = len(blocks["y"])
    rows = {k: v.unbind() for k, v in blocks.items()}
    of = [{k: v[b] for k, v in rows.items()} | {"block": b, "blocks": count} for b in range(count)]
    while True:
        yield of[int(torch.randint(count, (), generator=stream))].copy()


def _mean(blocks: Params, x: Params) -> Params:
    """The coefficients of the whole, where x is, in float64."""
    return {k: v.mean(0).to(x["x"].device) for k, v in blocks.items()}


def _orthogonal(size: int, stream: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=stream, dtype=torch.float64)).Q


def _root(size: int, stream: torch.Generator) -> Tensor:
    """The square root of a random matrix with eigenvalues log-spaced from SMALLEST to 1."""
    q = _orthogonal(size, stream)
    values = torch.logspace(0, 1, size, base=SMALLEST, dtype=torch.float64)
    return q @ values.sqrt().diag() @ q.T


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ, sample by sample."""
    return a[:, :, None] * b[:, None, :]
