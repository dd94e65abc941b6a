"""Products with second derivatives to hold a relative error along a run, by a peer's linear solver.

A solver gets the loosest tolerance, of powers of ten, at which its hypergradient is good enough at
every point. That is more than a user can know: on digits conjugate gradient takes 1e-13 of ‖b‖ for
an error of 1e-3, since the hypergradient is made of a small part of the adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.types import Params
from bilevel_problems.logistic import Logistic
from tests.benchmarks import products
from tests.benchmarks.products import ERROR, At

Solve = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, float], Tensor]
"""(product, right-hand side, start, tolerance) ↦ the adjoint."""


class CannotHold(Exception):
    """A method has no part in a row, for the reason that it says."""


@dataclass(frozen=True)
class Held:
    """The points of a run; on digits condition numbers are 3e3 to 4e3."""

    steps: int = 30
    problem: Logistic = products.PROBLEMS["digits"]

    def to(self, dtype: torch.dtype) -> Held:
        return self

    @cached_property
    def points(self) -> list[At]:
        return products.run_of(self.problem, self.steps)

    def truth(self) -> Params:
        return {f"{k:03}": point.truth["log_penalty"] for k, point in enumerate(self.points)}


class Told:
    """A solver along the points; `products` counts, a call returns the hypergradients."""

    def __init__(self, task: Held, solve: Solve) -> None:
        self._task, self._solve = task, solve
        self.count, self._found = 0, {}
        for k in range(1, 17):
            self.count, self._found = 0, {}
            if self._holds(10.0**-k):
                return
        raise CannotHold(f"no tolerance down to 1e-16 of its solver holds an error of {ERROR:g}")

    def products(self) -> int:
        return self.count

    def __call__(self) -> Params:
        return self._found

    def _holds(self, tolerance: float) -> bool:
        v = torch.zeros_like(self._task.points[0].y["w"])
        for k, point in enumerate(self._task.points):
            v, h = self._at(point, v, tolerance)
            if point.error({"log_penalty": h}) > ERROR:
                return False
            self._found[f"{k:03}"] = h
        return True

    def _at(self, point: At, v: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        problem, splits = point.problem, point.problem.splits
        x = point.x["log_penalty"].detach().requires_grad_()
        w = point.y["w"].detach().requires_grad_()
        F = problem.upper_loss({"log_penalty": x}, {"w": w}, splits["upper"])
        G = problem.lower_loss({"log_penalty": x}, {"w": w}, splits["lower"])
        (F_w,) = torch.autograd.grad(F, w)
        (G_w,) = torch.autograd.grad(G, w, create_graph=True)

        def product(u: Tensor) -> Tensor:
            self.count += 1
            return torch.autograd.grad(G_w, w, u, retain_graph=True)[0]

        v = self._solve(product, F_w, v, tolerance).detach()
        (cross,) = torch.autograd.grad(G_w, x, v)
        return v, -cross
