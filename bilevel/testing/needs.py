"""Closed forms for estimators that need more of a problem than two losses, and who gets which.

ConstrainedCase:     G of `ClosedForm` over y_first + y_second = e and y_last ≤ b, the bound active,
          y*(x) = p + Z (ZᵀAZ)⁻¹ ZᵀA (B x + c − p) with Z a basis of what the constraints leave free
AdaptationCase:  G = Σᵢ ½ (yᵢ − cᵢ)ᵀ A (yᵢ − cᵢ) + ½ λ ‖yᵢ − x‖², two copies yᵢ of x, from yᵢ = x,
          F = mean of ½ ‖yᵢ − tᵢ‖² + ½ ρ ‖x − p‖², y*ᵢ = (A + λI)⁻¹ (A cᵢ + λ x)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.rng import Streams
from bilevel.testing.cases import RHO, ClosedForm, cases
from bilevel.types import Estimator, Params

PROXIMAL = 5.0
"""λ of `AdaptationCase`: large, so that what drops the derivative of the steps is not far off."""


@dataclass(frozen=True)
class ConstrainedCase:
    """A quadratic lower level over one equality and one active bound; one more that is not active."""

    free: ClosedForm = field(default_factory=ClosedForm)

    @property
    def num_lower(self) -> int:
        return self.free.num_lower

    @cached_property
    def limits(self) -> tuple[float, float]:
        """(e, b): b is well below where y_last would be, so the multiplier is well above zero."""
        c = self.free.constants["c"]
        return float(c[0] + c[1]) + 0.7, float(c[-1]) - 4.0

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x, y = self.free.init(streams)
        return x, self.project_lower(y)

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return self.free.upper_loss(x, y, batch)

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return self.free.lower_loss(x, y, batch)

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.free.upper_batches(stream)

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.free.lower_batches(stream)

    def project_lower(self, y: Params) -> Params:
        flat, (total, bound) = tree.flatten(y), self.limits
        excess = (flat[0] + flat[1] - total) / 2
        first, rest = flat[:2] - excess, flat[2:-1].clamp(max=1e3)
        return tree.unflatten(torch.cat([first, rest, flat[-1:].clamp(max=bound)]), y)

    def lower_constraints(self, x: Params, y: Params, batch: Params) -> Params:
        """y_first + y_second = e; y_last ≤ b, and the others ≤ 1,000."""
        flat, (total, bound) = tree.flatten(y), self.limits
        above = torch.cat([flat[-1:] - bound, flat[2:-1] - 1e3])
        return {"equality": flat[:2].sum().reshape(1) - total, "inequality": above}

    def lower_solution(self, x: Params) -> Params:
        """p + Z (ZᵀAZ)⁻¹ ZᵀA (B x + c − p)."""
        k, (p, response) = self.free.constants, self._reduced
        y = p + response @ (k["B"] @ tree.flatten(x).double() + k["c"] - p)
        _, like = self.free.init(Streams(0))
        return tree.unflatten(y.to(tree.flatten(x).dtype), tree.map(lambda e: e.to(y), like))

    def hypergradient(self, x: Params) -> Params:
        """∇x F + (dy*/dx)ᵀ ∇y F, dy*/dx = Z (ZᵀAZ)⁻¹ ZᵀA B."""
        k, at = self.free.constants, tree.flatten(x).double()
        y, far = tree.flatten(self.lower_solution(tree.map(Tensor.double, x))), at - k["p"]
        h = RHO * far + 0.08 * far**3
        if not self.free.without_y:
            slope = y - k["t"] + k["D"] @ at
            h = h + k["D"].T @ y + (self._reduced[1] @ k["B"]).T @ slope
        return tree.cast(h, x)

    @cached_property
    def _reduced(self) -> tuple[Tensor, Tensor]:
        """(p, Z (ZᵀAZ)⁻¹ ZᵀA)."""
        A, (total, bound) = self.free.constants["A"], self.limits
        J = torch.zeros(2, len(A), dtype=torch.float64)
        J[0, :2], J[1, -1] = 1.0, 1.0
        p = J.T @ torch.linalg.solve(J @ J.T, torch.tensor([total, bound], dtype=torch.float64))
        Z = torch.linalg.svd(J).Vh[2:].T
        return p, Z @ torch.linalg.solve(Z.T @ A @ Z, Z.T @ A)


@dataclass(frozen=True)
class AdaptationCase:
    """Two tasks that start at x and are held near it; what is learned is where to start."""

    num_upper: int = 3
    without_y: bool = False
    seed: int = 0

    @property
    def num_lower(self) -> int:
        return 2 * self.num_upper

    @cached_property
    def constants(self) -> Params:
        """A with eigenvalues from 0.5 to 1.5, c and t of both tasks, t and p near c; in float64."""
        n, stream = self.num_upper, rng.stream(self.seed, "started")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        Q = torch.linalg.qr(draw(n, n)).Q
        A = Q @ torch.linspace(0.5, 1.5, n, dtype=torch.float64).diag() @ Q.T
        c = draw(2, n) + 3
        return {"A": A, "c": c, "t": c + 0.1 * draw(2, n), "p": c.mean(0) + 0.1 * draw(n)}

    def init(self, streams: Streams) -> tuple[Params, Params]:
        x = 0.3 * torch.randn(self.num_upper, generator=streams["init"], dtype=torch.float64)
        at = {"slope": x[:-1], "level": x[-1].reshape(())}
        at = at if self.num_upper > 1 else {"level": at["level"]}
        return at, self.lower_start(at, {})

    def lower_start(self, x: Params, y: Params) -> Params:
        return {name: p.expand(2, *p.shape).clone() for name, p in x.items()}

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        alone = 0.5 * RHO * (tree.flatten(x) - batch["p"]).square().sum()
        weight = 0.0 if self.without_y else 0.25
        return alone + weight * (_rows(y) - batch["t"]).square().sum()

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        off, far = _rows(y) - batch["c"], _rows(y) - tree.flatten(x)
        return 0.5 * ((off @ batch["A"]) * off).sum() + 0.5 * PROXIMAL * far.square().sum()

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat({**self.constants, "block": 0, "blocks": 1})

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return self.upper_batches(stream)

    def lower_solution(self, x: Params) -> Params:
        """(A + λI)⁻¹ (A cᵢ + λ x)."""
        k, at = self.constants, tree.flatten(x).double()
        y = torch.linalg.solve(self._matrix, (k["c"] @ k["A"] + PROXIMAL * at).T).T
        parts = y.to(tree.flatten(x).dtype).split([p.numel() for p in x.values()], dim=1)
        return {n: part.reshape(2, *x[n].shape) for n, part in zip(x, parts, strict=True)}

    def hypergradient(self, x: Params) -> Params:
        """ρ (x − p) + ½ λ (A + λI)⁻¹ Σ (y*ᵢ − tᵢ)."""
        k, h = self.constants, RHO * (tree.flatten(x).double() - self.constants["p"])
        if not self.without_y:
            off = _rows(self.lower_solution(tree.map(Tensor.double, x))) - k["t"]
            h = h + 0.5 * PROXIMAL * torch.linalg.solve(self._matrix, off.sum(0))
        return tree.cast(h, x)

    @cached_property
    def _matrix(self) -> Tensor:
        A = self.constants["A"]
        return A + PROXIMAL * torch.eye(len(A), dtype=torch.float64)


def _rows(y: Params) -> Tensor:
    """[2, num_upper]."""
    return torch.cat([p.reshape(2, -1) for p in y.values()], dim=1)


def constrained_cases(seed: int) -> dict[str, Any]:
    return {
        "constrained": ConstrainedCase(ClosedForm(seed=seed)),
        "constrained, one upper variable": ConstrainedCase(
            ClosedForm(num_upper=1, num_lower=4, seed=seed)
        ),
    }


def adaptation_cases(seed: int) -> dict[str, Any]:
    return {
        "adaptation": AdaptationCase(seed=seed),
        "adaptation, one upper variable": AdaptationCase(num_upper=1, seed=seed),
    }


PROVIDED = {"lower_constraints": constrained_cases, "lower_start": adaptation_cases}
"""What an estimator may require of a problem, and the cases that have it."""


def cases_of(estimator: Estimator, seed: int) -> dict[str, Any]:
    """The problems an estimator is held to: those that have what it requires and what it knows."""
    needs = estimator.needs
    found = {} if needs.requires else cases(seed)
    for name, make in PROVIDED.items():
        if name in needs.requires:
            found = found | make(seed)
    if {"project_lower", "lower_constraints"} & needs.supports:
        found = found | constrained_cases(seed)
    return found


def unprovided(estimator: Estimator) -> list[str]:
    """What it requires that no case has."""
    return sorted(estimator.needs.requires - {*PROVIDED})


def without_y(problem: Any) -> Any:
    """The problem with y taken out of F."""
    if isinstance(problem, ConstrainedCase):
        return ConstrainedCase(replace(problem.free, without_y=True))
    return replace(problem, without_y=True)
