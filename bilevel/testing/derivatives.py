"""Derivatives and closed forms of a problem against differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.finite_differences import central
from bilevel.calculus.fixed_point_maps import backward_of
from bilevel.run.engine import Setup
from bilevel.testing.reference import STATIONARY, half_difference, noise_like, solve_tightly
from bilevel.types import Loss, Losses, Params, Point

ROUGH = 1e-2
"""Differences that change by more than this as their step is halved decide nothing."""


@dataclass(frozen=True)
class Place:
    """A problem at one point, on its first batches."""

    setup: Setup
    losses: Losses
    x: Params
    y: Params
    generator: torch.Generator

    @property
    def problem(self) -> Any:
        return self.setup.problem

    @property
    def both(self) -> tuple[Loss, Loss]:
        return self.losses.upper, self.losses.lower

    @property
    def point(self) -> Point:
        return Point(self.x, self.y)


def first_derivatives(at: Place) -> Iterator[str]:
    for loss in at.both:
        _, *found = calculus.gradients(loss, at.point)
        for name, gradient, of in zip("xy", found, (at.x, at.y), strict=True):
            if not of:
                continue

            def moved(entries: Params, name: str = name, loss: Loss = loss) -> Tensor:
                return loss(entries, at.y) if name == "x" else loss(at.x, entries)

            with torch.no_grad():
                known = central(moved, of, at.generator, full=0, num_directions=3)
            off = known.along(gradient) - known.slopes
            yield from _judge(f"∇{name} of {loss.level}_loss", off, known.slopes, known.error)


def _judge(what: str, off: Tensor, truth: Tensor, error: float) -> Iterator[str]:
    size = float(truth.norm())
    relative = float(off.norm()) / size if size else float(off.norm())
    if error <= ROUGH and not relative <= max(1e-5, 10 * error):
        yield f"{what} is {relative:.1e} off differences"


def second_derivatives(at: Place) -> Iterator[str]:
    lower = at.losses.lower
    made = calculus.linearize(lower, at.point)
    u, v = (tree.map(lambda p: noise_like(p, at.generator), at.y) for _ in range(2))
    Hu, Hv = made.hvp_yy(u), made.hvp_yy(v)
    a, b = tree.dot(u, Hv), tree.dot(v, Hu)
    if abs(a - b) > 1e-8 * (tree.norm(u) * tree.norm(Hv) + 1e-300):
        yield f"∂²yy G is not symmetric: {a:.6e} and {b:.6e}"
    cross = made.vjp_xy(v)
    for what, got, gradient in (
        ("(∂²yy G) v", Hv, lambda y: calculus.gradient_y(lower, at.x, y)[1]),
        ("(∂²xy G)ᵀ v", cross, lambda y: calculus.gradient_x(lower, at.x, y)),
    ):
        if not got:
            continue
        wide, narrow = (_slope(gradient, at.y, v, h) for h in (1e-4, 5e-5))
        size = tree.norm(narrow)
        rough = tree.norm(tree.sub(wide, narrow)) / size if size else 0.0
        off = tree.flatten(tree.sub(got, narrow))
        yield from _judge(what, off, tree.flatten(narrow), rough)


def _slope(gradient: Callable[[Params], Params], y: Params, v: Params, step: float) -> Params:
    h = step / tree.norm(v)
    return half_difference(h, *(gradient(tree.axpy(s * h, v, y)) for s in (1, -1)))


def solution(at: Place) -> Iterator[str]:
    y = at.setup.levels.solution(at.x, at.y)
    if y is None:
        return
    backward = backward_of(at.losses.lower, 1.0)
    _, g = calculus.gradient_y(at.losses.lower, at.x, y)
    if backward:
        g = tree.sub(y, backward(at.x, tree.sub(y, g)))  # zero where a proximal step rests
    _, far = calculus.gradient_y(at.losses.lower, at.x, at.y)
    if not tree.norm(g) <= STATIONARY * (1 + tree.norm(far)):
        yield (
            f"lower_solution(x) is not stationary: ‖∇y G‖ = {tree.norm(g):.1e} there, "
            f"{tree.norm(far):.1e} at the start"
        )


def hypergradient(at: Place) -> Iterator[str]:
    closed = at.setup.levels.get("hypergradient")
    if closed is None or not at.x:
        return
    h = closed(at.x)

    def value(x: Params) -> Tensor:
        y, _ = solve_tightly(at.setup.levels, at.losses.lower, x, at.y)
        return at.losses.upper(x, y)

    known = central(value, at.x, at.generator, step=1e-3)
    off = known.along(h) - known.slopes
    yield from _judge("hypergradient(x)", off, known.slopes, known.error)
