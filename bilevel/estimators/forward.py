"""Forward differentiation through the lower steps. Franceschi et al. (2017), arXiv:1703.01785.

With random directions: (FG)²U, Shen et al. (2024), arXiv:2406.14095.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from bilevel import calculus, rng, tree
from bilevel.calculus.products import gradients
from bilevel.components import component
from bilevel.optimizers.learned import upper_entries
from bilevel.scalars.functions import call
from bilevel.types import Estimate, Losses, Needs, Params, Path, Point, Stats
from bilevel.unrolling.nested import flat, rebuild, zeros
from bilevel.unrolling.path import advance, along, bound, projected, pull_start, recorded


@component
class Forward:
    """d/dx F(x, y_K(x)) by carrying dy_k/dx · d along the lower steps, a direction d at a time.

    Exact, and equal to reverse unrolling, over all coordinates of x: dim x · K products with
    ∂²yy G and with ∂²yx G, memory that does not grow with K. With `directions` = b random normal
    directions it is the mean of (h · d) d: unbiased, variance O(dim x / b), b · K products. And
    2K + 1 gradients either way: K steps, as many for the start of each product, and F.

    Raises:
        ProblemError: no lower step was recorded, or a loss has no second derivative.
        ConvergenceError: F or G became NaN or infinite.
    """

    directions: PositiveInt | None = None
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(path=float("inf"), learned=True)

    @property
    def claim(self) -> Literal["path"] | None:
        return None if self.directions else "path"

    def objective(self, losses: Losses, at: Point) -> Callable[[Params], Tensor]:
        """x ↦ F(x, y_K(x)), the function this estimator claims to differentiate."""
        return along(recorded(at, "forward"), losses)

    def init(self, at: Point) -> dict[str, int]:
        return {"calls": 0}

    def estimate(self, losses: Losses, at: Point, state: dict[str, int]) -> Estimate:
        path, dim = recorded(at, "forward"), tree.size(at.x)
        probes = self._probes(dim, state["calls"])
        carried = [tree.unflatten(d.to(tree.flatten(at.x)), at.x) for d in probes]
        y, tangents = _carry(path, losses, at.x, carried)
        value, F_x, F_y = gradients(losses.upper, Point(at.x, y))
        h = tree.zeros_like(at.x)
        for d, t in zip(carried, tangents, strict=True):
            tree.axpy_(h, (tree.dot(F_x, d) + tree.dot(F_y, t)) / self._weight(len(probes)), d)
        state = {"calls": state["calls"] + 1}
        return Estimate(h, value, state, Stats(iterations=len(path.batches)))

    def _weight(self, count: int) -> int:
        return count if self.directions else 1

    def _probes(self, dim: int, calls: int) -> Tensor:
        if self.directions is None:
            return torch.eye(dim, dtype=torch.float64)
        return call(_drawn, self.seed, calls, self.directions, dim)


def _drawn(seed: int, calls: int, count: int, dim: int) -> Tensor:
    stream = rng.stream(seed, f"forward.{calls}")
    return torch.randn(count, dim, generator=stream, dtype=torch.float64)


def _carry(
    path: Path, losses: Losses, x: Params, directions: list[Params]
) -> tuple[Params, list[Params]]:
    """(y_K, dy_K/dx · d for every d)."""
    y, state = advance(path, losses.lower, x, 0).start, path.state
    pull_start(path, losses.lower, x, y)  # notes which of x the start depends on
    tangents = [_start_tangent(path, x, d) for d in directions]
    state_tangents: list[Any] = [zeros(state) for _ in directions]
    taken = upper_entries(path.optimizer, x)
    for batch in path.batches:
        lower = calculus.linearize(losses.lower.on(batch), Point(x, y))
        for i, (d, t) in enumerate(zip(directions, tangents, strict=True)):
            g_dot = tree.add(lower.hvp_yy(t), lower.jvp_yx(d))
            at = (taken, y, lower.gradient, state)
            moving = ({name: d[name] for name in taken}, t, g_dot, state_tangents[i])
            tangents[i], state_tangents[i] = _step_tangent(path, losses, at, moving)
        with torch.no_grad():
            y, state = bound(path, losses.lower, x, y).step(y, lower.gradient, state)
            y = projected(losses.lower, y)
    return y, tangents


def _start_tangent(path: Path, x: Params, direction: Params) -> Params:
    """dy_0/dx · direction: zero where the start is held fixed."""
    if path.restart is None:
        return tree.zeros_like(path.start)
    inputs = tree.leaves(x)
    with torch.enable_grad():
        y = path.restart(inputs)
    return rebuild(y, iter(_push(flat(y), flat(inputs), flat(direction))))


def _step_tangent(
    path: Path, losses: Losses, at: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Params, Any]:
    """The tangent of one optimizer step at (options taken from x, y, ∇y G, state)."""
    inputs = [leaf.detach().requires_grad_() for part in at for leaf in flat(part)]
    given = [leaf for part in tangents for leaf in flat(part)]
    leaves = iter(inputs)
    with torch.enable_grad():
        options, y, g, state = (rebuild(part, leaves) for part in at)
        y, state = bound(path, losses.lower, options, y).step(y, g, state)
        y = projected(losses.lower, y)
    pushed = iter(_push([*flat(y), *flat(state)], inputs, given))
    return rebuild(y, pushed), rebuild(state, pushed)


def _push(outputs: list[Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """Tangents of outputs from those of inputs, by two reverse passes through their graph.

    The pullback of a cotangent u is linear in u, and its derivative in u along the tangents is the
    pushforward. (Forward mode itself would do, but leans on deprecated parts of torch.)
    """
    moving = [out for out in outputs if out.requires_grad]
    if not moving:
        return [torch.zeros_like(out) for out in outputs]
    with torch.enable_grad():
        u = [torch.zeros_like(out, requires_grad=True) for out in moving]
        pulled = torch.autograd.grad(moving, inputs, u, create_graph=True, allow_unused=True)
        used = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None]
        pushed = torch.autograd.grad([p for p, _ in used], u, [t for _, t in used])
    found = iter(pushed)
    return [next(found) if out.requires_grad else torch.zeros_like(out) for out in outputs]
