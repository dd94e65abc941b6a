"""The response dy*/dx itself, a column of it at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import PositiveInt

from bilevel import component, tree
from bilevel.calculus import gradients, linearize
from bilevel.linear import CG
from bilevel.types import Estimate, Losses, Needs, Params, Point, Stats


@component
class Response:
    """∇x F + (dy*/dx)ᵀ ∇y F with (∂²yy G) dy*/dx = −∂²yx G solved by CG, an entry of x at a time.

    Exact where the solves are. dim x solves, dim x + 1 cross products; no state.
    """

    iterations: PositiveInt = 20

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def claim(self) -> Literal["solution"]:
        return "solution"

    def tight(self, dim: int) -> Response:
        return replace(self, iterations=4 * dim + 10)

    def init(self, at: Point) -> dict[str, Any]:
        return {}

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, h, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        solver, zero = CG(iterations=self.iterations, tolerance=1e-12), tree.zeros_like(at.y)
        converged, flat = True, tree.flatten(at.x)
        for i in range(len(flat)):
            column = flat.new_zeros(len(flat))
            column[i] = 1
            direction: Params = tree.unflatten(column, at.x)
            solve = solver.solve(lower.hvp_yy, lower.jvp_yx(direction), zero)
            converged = converged and solve.stats.converged is not False
            tree.axpy_(h, -tree.dot(solve.solution, F_y), direction)
        return Estimate(h, value, state, Stats(converged=converged))
