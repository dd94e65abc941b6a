"""LancBiO: the adjoint from a Lanczos basis that grows from one upper step to the next.

Yang, Gao and Yuan (2025), arXiv:2404.03331, the dynamic Lanczos process with restarts. Unlike
there, each basis vector is made orthogonal to all the others: without that the matrix that is
inverted may become singular, and errors of 100 % and more were measured at `dimension` 20.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradients, linearize
from bilevel.components import component
from bilevel.linear.guards import damped, require_finite
from bilevel.scalars.functions import call
from bilevel.scalars.matrices import least_squares, numbers_of, tensor_of
from bilevel.types import Estimate, Losses, Matvec, Needs, Params, Point, Stats, Stopped


@component
class LancBiO:
    """∇x F − (∂²xy G)ᵀ v with v = a + Q T⁻¹ Qᵀ (∇y F − A a), A = ∂²yy G + damping · I.

    Q is an orthonormal basis of up to `dimension` vectors, to which each call adds `products`, and
    T = tridiagonal, what A was in it when each was added. A full basis is dropped: its v becomes
    the new a, and the residual there the first vector. So v follows a solution that moves slowly
    for 1 + 1 / dimension HVPs a call at `products` 1, plus 2 gradients and 1 cross product, and
    the error stays at what A and ∇y F change by within `dimension` calls. At fixed losses it is
    exact after dim(y) products in one basis.

    `residual` reports ‖∇y F − A v‖ / ‖∇y F‖ for one more HVP, and as `converged` whether it is at
    most `tolerance`; without it nothing is said of either. `Stats.curvature` is the smallest
    eigenvalue of T. Keeps `dimension` + 4 vectors of the size of y.
    """

    dimension: PositiveInt = 5
    products: PositiveInt = 1
    damping: NonNegativeFloat = 0.0
    residual: bool = False
    tolerance: NonNegativeFloat = 1e-6

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def claim(self) -> Literal["solution"] | None:
        return None if self.damping else "solution"

    def tight(self, dim: int) -> LancBiO:
        """Whole bases in one call, as far as that is affordable, where its claim can be tested."""
        dim = min(dim, 100)
        return replace(self, dimension=dim, products=3 * dim, residual=True, tolerance=1e-8)

    def init(self, at: Point) -> dict[str, Any]:
        return _restart(tree.zeros_like(at.y), tree.zeros_like(at.y))

    def estimate(self, losses: Losses, at: Point, state: dict[str, Any]) -> Estimate:
        value, F_x, F_y = gradients(losses.upper, at)
        lower = linearize(losses.lower, at)
        b, added = lower.restrict(F_y), 0

        def matvec(u: Params) -> Params:
            return tree.axpy(self.damping, u, lower.hvp_yy(u))

        for _ in range(self.products):
            grown = self._grown(matvec, b, state)
            if grown is None:
                break
            state, added = grown, added + 1
        v = _solution(state, b)
        hypergradient = tree.sub(F_x, lower.vjp_xy(v))
        ritz = numbers_of(call(torch.linalg.eigvalsh, _tridiagonal(state)))
        # a basis that cannot grow has a v that solves the system as well as the dtype allows
        stopped: Stopped = "iterations" if added == self.products else "rounding"
        error, curvature = tree.dot(v, lower.gradient), min(ritz, default=None)
        stats = Stats(iterations=added, curvature=curvature, stopped=stopped, value_error=error)
        if self.damping:
            stats = damped(stats, self.damping, v, tree.norm(b))
        if self.residual:
            off = tree.norm(tree.sub(b, matvec(v))) / (tree.norm(b) or 1.0)
            solved = off <= self.tolerance
            stopped = "tolerance" if solved else stopped
            stats = replace(stats, residual=off, converged=solved, stopped=stopped)
        return Estimate(hypergradient, value, state, stats)

    def _grown(self, matvec: Matvec, b: Params, state: dict[str, Any]) -> dict[str, Any] | None:
        """The state with one more basis vector; None where the restarted v solves the system."""
        if not state["next"] or len(state["basis"]) >= self.dimension:
            v = _solution(state, b)
            state = _restart(v, matvec(v) if tree.norm(v) else v)
            left = tree.sub(b, state["product"])
            size = tree.norm(left)
            if size <= tree.eps(b) * tree.norm(b):
                return None
            state["next"] = tree.scale(1 / size, left)
        q = state["next"]
        u = matvec(q)
        diagonal = [*state["diagonal"], require_finite(tree.dot(q, u), q)]
        basis = [*state["basis"], q]
        size = tree.norm(u)
        for earlier in (*basis, *basis):  # twice: once leaves what cancellation brings back
            u = tree.axpy(-tree.dot(earlier, u), earlier, u)
        beta = tree.norm(u)
        ended = beta <= 10 * tree.eps(b) * size
        return {
            **state,
            "basis": basis,
            "diagonal": diagonal,
            "off": [*state["off"], beta],
            "next": {} if ended else tree.scale(1 / beta, u),
        }


def _restart(v: Params, product: Params) -> dict[str, Any]:
    """No basis, at the anchor v whose product with A is known."""
    empty = {"basis": [], "diagonal": [], "off": [], "next": {}}
    return {"anchor": v, "product": product, **empty}


def _solution(state: dict[str, Any], b: Params) -> Params:
    """a + Q T⁻¹ Qᵀ (b − A a), A a being the product at the restart."""
    if not state["basis"]:
        return state["anchor"]
    left = tree.sub(b, state["product"])
    right = tensor_of([tree.dot(q, left) for q in state["basis"]])
    weights = numbers_of(least_squares(_tridiagonal(state), right))
    v = state["anchor"]
    for q, weight in zip(state["basis"], weights, strict=True):
        v = tree.axpy(weight, q, v)
    return v


def _tridiagonal(state: dict[str, Any]) -> Tensor:
    main, off = (tensor_of(state[name]) for name in ("diagonal", "off"))
    return main.diag() + off[:-1].diag(1) + off[:-1].diag(-1)
