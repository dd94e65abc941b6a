"""Small problems with closed forms, on which `check_estimator` stands.

    G(x, y) = ½ rᵀ A r,  r = s(y) − (B x + c),  s the identity or sinh, entry by entry
    F(x, y) = ½ ‖y − t‖² + ½ ρ ‖x − p‖² + yᵀ D x,  or its part in x alone

so that y*(x) = s⁻¹(B x + c). With sinh every second derivative of G changes with y. x and y have
several entries of several shapes; nothing is centred at zero. Estimators that respect what restricts y,
or that learn where the lower level starts, are held to `ConstrainedCase` and `AdaptationCase` as well, or instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.rng import Streams
from bilevel.types import Params

RHO = 0.2


@dataclass(frozen=True)
class ClosedForm:
    """One problem; `without_y` takes y out of F, so that dΦ/dx = ∇x F."""

    num_upper: int = 3
    num_lower: int = 5
    is_nonlinear: bool = False
    without_y: bool = False
    seed: int = 0

    @cached_property
    def constants(self) -> Params:
        """A with eigenvalues from 0.5 to 1.5, B, c, D, p, t; in float64."""
        n, m = self.num_upper, self.num_lower
        stream = rng.stream(self.seed, "closed form")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        Q = torch.linalg.qr(draw(m, m)).Q
        spectrum = torch.linspace(0.5, 1.5, m, dtype=torch.float64)
        return {
            "A": Q @ spectrum.diag() @ Q.T,
            "B": torch.linalg.qr(draw(max(m, n), min(m, n))).Q.reshape(m, n),
            "c": 0.3 * draw(m) + 0.5,
            "D": draw(m, n) / (m * n) ** 0.5,
            "p": draw(n) - 1,
            "t": draw(m) + 3,
        }

    def init(self, streams: Streams) -> tuple[Params, Params]:
        stream = streams["init"]
        x, y = (
            torch.randn(size, generator=stream, dtype=torch.float64)
            for size in (self.num_upper, self.num_lower)
        )
        return _split(0.5 * x + 0.4, "slope", "level"), _split(0.3 * y, "weight", "bias")

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        at = tree.flatten(x)
        far = at - batch["p"]
        alone = 0.5 * RHO * far @ far + 0.02 * (far**4).sum()
        lower = tree.flatten(y)
        if self.without_y:
            return alone + 0.0 * lower.sum()  # a loss that y does not reach at all is refused
        off = lower - batch["t"]
        return alone + 0.5 * off @ off + lower @ (batch["D"] @ at)

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        lower = tree.flatten(y)
        r = (lower.sinh() if self.is_nonlinear else lower) - self._goal(x, batch)
        return 0.5 * r @ (batch["A"] @ r)

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat(self._batch())

    def lower_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat(self._batch())

    def lower_solution(self, x: Params) -> Params:
        """s⁻¹(B x + c)."""
        goal = self._goal(x, tree.to(self.constants, "cpu", tree.flatten(x).dtype))
        return _split(goal.asinh() if self.is_nonlinear else goal, "weight", "bias")

    def hypergradient(self, x: Params) -> Params:
        """∇x F + (dy*/dx)ᵀ ∇y F."""
        k, at = self.constants, tree.flatten(x).double()
        far = at - k["p"]
        h = RHO * far + 0.08 * far**3
        if not self.without_y:
            y = tree.flatten(self.lower_solution(tree.map(Tensor.double, x)))
            slope = 1 / y.cosh() if self.is_nonlinear else torch.ones_like(y)
            h = h + k["D"].T @ y + k["B"].T @ (slope * (y - k["t"] + k["D"] @ at))
        return tree.cast(h, x)

    def _batch(self) -> dict[str, Any]:
        """The one block of data that there is, for methods that remember blocks."""
        return {**self.constants, "block": 0, "blocks": 1}

    def _goal(self, x: Params, batch: Params) -> Tensor:
        return batch["B"] @ tree.flatten(x) + batch["c"]


def _split(values: Tensor, first: str, last: str) -> Params:
    """A matrix or vector and a scalar; the scalar alone where there is one value."""
    head, tail = values[:-1], values[-1].reshape(())
    if not len(head):
        return {last: tail}
    return {first: head.reshape(2, -1) if len(head) == 4 else head, last: tail}


def cases(seed: int) -> dict[str, Any]:
    """The problems that every estimator without needs of its own is held to, by name."""
    return {
        "quadratic": ClosedForm(seed=seed),
        "one lower variable": ClosedForm(num_lower=1, seed=seed),
        "one upper variable": ClosedForm(num_upper=1, num_lower=3, seed=seed),
        "nonlinear": ClosedForm(is_nonlinear=True, seed=seed),
    }
