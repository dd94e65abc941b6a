"""Maps T whose fixed point y = T(x, y) is the lower solution, with their derivatives.

Either the problem's own (`lower_map`), or a forward-backward step: a gradient step on G, then the
proximal map or the projection, where the lower level has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bilevel import calculus, rng, tree
from bilevel.calculus.products import Linearization
from bilevel.errors import ProblemError
from bilevel.scalars.functions import call
from bilevel.types import Loss, Params, Point

Backward = Callable[[Params, Params], Params]
"""(x, z) ↦ the point after the gradient step has led to z."""

JUMP = 1e-2
"""A change in an entry of the Jacobian's product with ±1 above which it is a kink."""


class Map(Protocol):
    """T at a point, with products of its derivatives."""

    @property
    def shift(self) -> Params:
        """T(x, y) − y; zero at the fixed point."""
        ...

    @property
    def curvature(self) -> list[float]:
        """wᵀ∂²yy G w / wᵀw of the directions met; empty where no G is involved."""
        ...

    def vjp_y(self, vector: Params) -> Params:
        """(∂y T)ᵀ · vector, counted as 1 HVP."""
        ...

    def vjp_x(self, vector: Params) -> Params:
        """(∂x T)ᵀ · vector, counted as 1 cross product."""
        ...

    def restrict(self, vector: Params) -> Params:
        """`vector` with zeros where the lower level never moves y."""
        ...

    def kinks(self, margin: float) -> int:
        """Entries of T whose derivative jumps within `margin`, or within |T(x, y) − y|, of here."""
        ...


def linearize_map(loss: Loss, at: Point, lr: float) -> Map:
    """The map of the lower level at a point: the problem's own, or forward-backward with step `lr`.

    Costs 1 gradient, or 1 evaluation of the problem's map, counted as one.

    Raises:
        ProblemError: the map returns other names or shapes than those of y, or a problem has both
            a projection and a proximal map.
    """
    if loss.structure.map is not None:
        return _given(loss, at)
    lower = calculus.linearize(loss, at)
    z = tree.axpy(-lr, lower.gradient, at.y)
    backward = backward_of(loss, lr)
    if backward is None:
        return _Forward(tree.sub(z, at.y), lower, lr)
    x, z = tree.leaves(at.x), tree.leaves(z)
    with torch.enable_grad():
        after = backward(x, z)
    require_like(after, at.y, "prox_lower" if loss.structure.prox else "project_lower")
    shift = tree.sub(tree.detach(after), at.y)
    return _ForwardBackward(shift, lower, lr, loss, backward, x, z, after)


def backward_of(loss: Loss, lr: float) -> Backward | None:
    """The proximal map with step `lr`, or the projection, or None where there is neither."""
    prox, project = loss.structure.prox, loss.structure.project
    if prox is not None and project is not None:
        raise ProblemError(
            "the problem has both project_lower and prox_lower, and one does not follow from the "
            "other: let prox_lower be the proximal map of R on the set, and drop project_lower"
        )
    if prox is not None:
        return lambda x, z: prox(x, z, lr)
    return None if project is None else lambda x, z: project(z)


def evaluate(loss: Loss, x: Params, y: Params) -> Params:
    """T(x, y) of the problem's own map, with whatever graph x and y bring. Counts as 1 gradient.

    Raises:
        ProblemError: it has none, or one of other names or shapes than y.
    """
    if loss.structure.map is None:
        raise ProblemError(
            "the lower level has no map to iterate: give the problem lower_map(x, y, batch), or "
            "use lower: gradient, which minimises lower_loss"
        )
    loss.counts.gradients += 1
    after = loss.structure.map(x, y, loss.one_batch)
    require_like(after, y, "lower_map")
    return after


def require_like(after: Params, y: Params, name: str) -> None:
    """Raise `ProblemError` unless `after` has the names and shapes of y."""
    tree.require(after, f"what {name} returns")
    got, expected = ({n: tuple(p.shape) for n, p in part.items()} for part in (after, y))
    if got != expected:
        raise ProblemError(f"{name} returned {got}; expected the names and shapes of y: {expected}")


def reached(loss: Loss, at: Point) -> set[str]:
    """Upper variables that reach the proximal map, the map or the constraints of the lower level."""
    kinds, x = loss.structure, tree.leaves(at.x)
    with torch.enable_grad():
        found = [
            *(kinds.prox(x, at.y, 1.0).values() if kinds.prox else ()),
            *(kinds.map(x, at.y, loss.one_batch).values() if kinds.map else ()),
            *(kinds.constraints(x, at.y, loss.one_batch).values() if kinds.constraints else ()),
        ]
        live = [part.sum() for part in found if part.requires_grad]
        if not live:
            return set()
        slopes = torch.autograd.grad(live, list(x.values()), allow_unused=True)
    return {name for name, slope in zip(x, slopes, strict=True) if slope is not None}


def _given(loss: Loss, at: Point) -> Map:
    x, y = tree.leaves(at.x), tree.leaves(at.y)
    with torch.enable_grad(), calculus.second_order(loss):
        after = evaluate(loss, x, y)
    if not any(part.requires_grad for part in after.values()):
        raise ProblemError(
            "lower_map depends on neither x nor y, so that all its derivatives would be zero: it "
            "detaches them, or runs under torch.no_grad()"
        )
    return _Given(tree.sub(tree.detach(after), at.y), loss, x, y, after)


@dataclass(frozen=True)
class _Given:
    """The problem's own T."""

    shift: Params
    _loss: Loss
    _x: Params
    _y: Params
    _after: Params
    curvature: list[float] = field(default_factory=list)

    def vjp_y(self, vector: Params) -> Params:
        self._loss.counts.hvps += 1
        return calculus.vjp(self._after, self._y, vector, self._loss)

    def vjp_x(self, vector: Params) -> Params:
        self._loss.counts.cross_products += 1
        return calculus.vjp(self._after, self._x, vector, self._loss, upper=True)

    def restrict(self, vector: Params) -> Params:
        return vector

    def kinks(self, margin: float) -> int:
        return 0


@dataclass(frozen=True)
class _Forward:
    """y − lr ∇y G."""

    shift: Params
    _lower: Linearization
    _lr: float
    curvature: list[float] = field(default_factory=list)

    def vjp_y(self, vector: Params) -> Params:
        Hw, size = self._lower.hvp_yy(vector), tree.dot(vector, vector)
        if size:
            self.curvature.append(tree.dot(vector, Hw) / size)
        return tree.axpy(-self._lr, Hw, vector)

    def vjp_x(self, vector: Params) -> Params:
        return tree.scale(-self._lr, self._lower.vjp_xy(vector))

    def restrict(self, vector: Params) -> Params:
        return self._lower.restrict(vector)

    def kinks(self, margin: float) -> int:
        return 0


@dataclass(frozen=True)
class _ForwardBackward:
    """P(x, y − lr ∇y G): (∂yT)ᵀv = (I − lr ∂²yy G) w with w = (∂zP)ᵀ v."""

    shift: Params
    _lower: Linearization
    _lr: float
    _loss: Loss
    _backward: Backward
    _x: Params
    _z: Params
    _after: Params
    curvature: list[float] = field(default_factory=list)

    def _pull(self, vector: Params) -> Params:
        return calculus.vjp(self._after, self._z, vector, self._loss)

    @property
    def _step(self) -> _Forward:
        return _Forward(self.shift, self._lower, self._lr, self.curvature)

    def vjp_y(self, vector: Params) -> Params:
        return self._step.vjp_y(self._pull(vector))

    def vjp_x(self, vector: Params) -> Params:
        through = self._step.vjp_x(self._pull(vector))
        direct = calculus.vjp(self._after, self._x, vector, self._loss, upper=True)
        return tree.add(through, direct)

    def restrict(self, vector: Params) -> Params:
        return self._lower.restrict(vector)

    def kinks(self, margin: float) -> int:
        largest, left = _largest(self._z), _largest(self.shift)
        width = max(margin * min(1.0, self._lr), 100 * tree.eps(self._z)) * (1 + largest) + left
        here = tree.detach(self._z)
        signs, probe = call(_probes, here)
        above, below = (self._jacobian(tree.axpy(s * width, signs, here), probe) for s in (1, -1))
        gap = tree.sub(above, below)
        return call(
            int, tree.summed(tree.map(lambda part: (part.abs() > JUMP).double(), gap)).item()
        )

    def _jacobian(self, z: Params, probe: Params) -> Params:
        x, z = tree.detach(self._x), tree.leaves(z)
        with torch.enable_grad():
            return calculus.vjp(self._backward(x, z), z, probe, self._loss)


def _largest(a: Params) -> float:
    return tree.largest(tree.map(lambda part: part.detach().abs(), a))


def _probes(like: Params) -> tuple[Params, Params]:
    """Two directions of ±1."""
    stream = rng.stream(0, "kinks")
    one, other = (tree.drawn(lambda p: rng.signs(p, stream), like) for _ in range(2))
    return one, other
