"""Central differences: of a function of x with an estimate of their error, and of ∇x G along y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import tree
from bilevel.calculus.precision import require_step
from bilevel.calculus.products import gradient_x
from bilevel.types import Loss, Params, Point


@dataclass(frozen=True)
class Differences:
    """Directional derivatives along the columns of `directions` and how far they may be off."""

    directions: Tensor
    """[dim, k], orthonormal; the identity where all of the gradient was taken."""
    slopes: Tensor
    """[k], in the order of the columns."""
    error: float
    """Estimated relative error, from the change as the step is halved."""

    def along(self, gradient: Params) -> Tensor:
        """A gradient's components in the same directions."""
        return self.directions.T @ tree.flatten(gradient).to(self.directions)


def central(
    function: Callable[[Params], Tensor],
    x: Params,
    generator: torch.Generator,
    *,
    step: float = 1e-4,
    full: int = 24,
    num_directions: int = 6,
) -> Differences:
    """(φ(x + h d) − φ(x − h d)) / 2h extrapolated over h and h/2 (Richardson): error O(h⁴).

    Every coordinate where dim x ≤ `full`, else orthonormal random directions. h = step · (1 +
    ‖x‖ / √dim) for a coordinate. Costs 4 values of φ a direction.
    """
    flat = tree.flatten(x).double()
    dim = len(flat)
    if dim <= full:
        directions = torch.eye(dim, dtype=torch.float64)
    else:
        noise = torch.randn(dim, num_directions, generator=generator, dtype=torch.float64)
        directions = torch.linalg.qr(noise).Q
    scale = float(1 + flat.norm() / dim**0.5) * (1.0 if dim <= full else dim**0.5)
    directions = directions.to(flat.device)

    def slope(d: Tensor, h: float) -> float:
        above, below = (
            function(tree.unflatten((flat + s * h * d).to(tree.flatten(x)), x)) for s in (1, -1)
        )
        return float(above.detach() - below.detach()) / (2 * h)

    h = step * scale
    wide = torch.tensor([slope(d, h) for d in directions.T], dtype=torch.float64)
    narrow = torch.tensor([slope(d, h / 2) for d in directions.T], dtype=torch.float64)
    slopes = (4 * narrow - wide) / 3
    size = float(slopes.norm())
    error = float((wide - narrow).norm()) / size if size else 0.0
    return Differences(directions, slopes.to(flat.device), error)


def cross_difference(name: str, loss: Loss, at: Point, v: Params, epsilon: float) -> Params:
    """(∂²xy G)ᵀ v from ∇x G at y ± h v, h = epsilon / ‖v‖: error O(epsilon²). 2 gradients.

    `name` is the estimator's, for the error. Raises `ProblemError` where y is of a dtype too
    coarse for the step.
    """
    size = tree.norm(v)
    if size == 0:
        return tree.zeros_like(at.x)
    require_step(name, epsilon, at.y)
    h = epsilon / size
    above = gradient_x(loss, at.x, tree.axpy(h, v, at.y))
    below = gradient_x(loss, at.x, tree.axpy(-h, v, at.y))
    return tree.scale(1 / (2 * h), tree.sub(above, below))
