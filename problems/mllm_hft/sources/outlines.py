"""Shapes as signed distances: negative inside, about 1 unit of slope across the edge.

Each takes coordinates (u to the right, v downwards) in which the shape fills the unit disc. Exact
near the edges, where soft borders need it, and not far from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Outline = Callable[[Tensor, Tensor], Tensor]


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


def _edge(u: Tensor, v: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Distance to the line through two points, positive to the left of the way along it."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    return ((u - start[0]) * down - (v - start[1]) * across) / length


def circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.9


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.72).abs() - 0.22


def square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.78, 0.78)


def diamond(u: Tensor, v: Tensor) -> Tensor:
    return _edge(u.abs(), v.abs(), (0.62, 0.0), (0.0, 1.0))


def triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_edge(u.abs(), v, (0.0, -1.0), (0.95, 0.75)), v - 0.75)


def cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.95, 0.28), _box(u, v, 0.28, 0.95))


def star(u: Tensor, v: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    radius, angle = torch.hypot(u, v), torch.atan2(u, -v)
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    dent = (0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2))
    return _edge(radius * angle.cos(), radius * angle.sin(), (1.05, 0.0), dent)


def heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = torch.hypot(u.abs() - 0.42, v + 0.35) - 0.5
    tip = torch.maximum(_edge(u.abs(), v, (0.807, -0.033), (0.0, 0.95)), -0.033 - v)
    return torch.minimum(lobes, tip)


def moon(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(u, v) - 0.95, 0.8 - torch.hypot(u - 0.5, v + 0.1))


def arrow(u: Tensor, v: Tensor) -> Tensor:
    shaft = _box(u + 0.4, v, 0.6, 0.2)
    head = torch.maximum(_edge(u, v.abs(), (1.0, 0.0), (0.0, 0.8)), -u)
    return torch.minimum(shaft, head)


def house(u: Tensor, v: Tensor) -> Tensor:
    walls = _box(u, v - 0.35, 0.68, 0.55)
    roof = torch.maximum(_edge(u.abs(), v, (0.0, -0.95), (0.95, -0.1)), v + 0.1)
    return torch.minimum(walls, roof)


def tree(u: Tensor, v: Tensor) -> Tensor:
    crown = torch.hypot(u, v + 0.3) - 0.68
    trunk = _box(u, v - 0.6, 0.2, 0.4)
    return torch.minimum(crown, trunk)


OUTLINES: dict[str, Outline] = {
    outline.__name__: outline
    for outline in (
        circle, ring, square, diamond, triangle, cross, star, heart, moon, arrow, house, tree
    )
}  # fmt: skip
