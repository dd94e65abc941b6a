"""The three directions of a single-loop method, evaluated at any point on any batches.

lower ∇y G,    adjoint ∂²yy G v − ∇y F,    upper ∇x F − (∂²xy G)ᵀ v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from bilevel import tree
from bilevel.calculus.products import gradient_y, gradients, linearize
from bilevel.directions.blocks import block_of, every_block
from bilevel.errors import ConvergenceError
from bilevel.types import Loss, Params, Point


class Triple(NamedTuple):
    """Where a single-loop method is: x, y and the adjoint v."""

    x: Params
    y: Params
    v: Params

    def save(self) -> dict[str, Params]:
        """As plain data; x and y are copied, since they are the caller's to write into."""
        return {"x": tree.clone(self.x), "y": tree.clone(self.y), "v": self.v}


@dataclass(frozen=True)
class Series:
    """A truncated Neumann series for (∂²yy G)⁻¹, each factor I − scale ∂²yy G on a batch of its own."""

    scale: float
    weight: float
    """Of the result: 1, or the number of terms where one term is drawn."""
    summed: bool
    """Whether the partial products are added up, or the last alone is taken."""

    def apply(self, factors: list[list[Loss]], point: Point, b: Params) -> Params:
        term = result = b
        length, growth = tree.norm(b), 0
        for losses in factors:
            product = self._product(losses, point, term)
            term = tree.axpy(-self.scale, product, term)
            before, length = length, tree.norm(term)
            growth = growth + 1 if length > before else 0
            if growth == 3:
                self._refuse(length / before)
            result = tree.add(result, term) if self.summed else term
        return tree.scale(self.scale * self.weight, result)

    def _product(self, losses: list[Loss], point: Point, v: Params) -> Params:
        return _mean(losses, lambda loss: _row(loss, point, v, ("hvp",)))["hvp"]

    def _refuse(self, ratio: float) -> None:
        raise ConvergenceError(
            f"the series of the adjoint diverges: three factors in a row made its term longer, the "
            f"last {ratio:.3g} times. adjoint_lr = {self.scale:g} must be below 2 / (largest "
            "eigenvalue of the lower Hessian), and the Hessian positive definite: lower "
            f"`adjoint_lr` to {0.9 * self.scale * 2 / (1 + ratio):.2g} or less, or use adjoint: steps"
        )


@dataclass(frozen=True)
class Batches:
    """The batches of one iteration. Each list is averaged over: one batch, or every block."""

    lower: list[Loss]
    upper: list[Loss]
    factors: list[list[Loss]] = field(default_factory=list)
    series: Series | None = None

    def whole(self) -> Batches:
        """The same on every block of data."""
        lower = every_block(self.lower[0]) if self.lower else []
        upper = every_block(self.upper[0]) if self.upper else []
        return Batches(lower, upper, [lower] * len(self.factors), self.series)


@dataclass
class OracleValues:
    """What quantities are made of, with the values of F and G met on the way."""

    lower: dict[str, Params]
    """By name: the slope ∇y G, the products "hvp" and "cross" with v, and "right", ∇y F, where they are wanted."""
    G: Tensor
    F: Tensor | None = None
    F_x: Params | None = None

    def total(self, quantity: str) -> Params:
        """A quantity: one share, or the difference of two."""
        shares = self._unsigned(quantity)
        return shares[0] if len(shares) == 1 else tree.sub(shares[0], shares[1])

    def shares(self, quantity: str) -> dict[str, Params]:
        """A quantity as the share of the lower batch and that of the upper one: their sum."""
        first, *others = self._unsigned(quantity)
        if not others:
            return {"lower": first}
        second = tree.scale(-1.0, others[0])
        lower, upper = (first, second) if quantity == "adjoint" else (second, first)
        return {"lower": lower, "upper": upper}

    def _unsigned(self, quantity: str) -> tuple[Params, ...]:
        if quantity == "lower":
            return (self.lower["slope"],)
        if quantity == "adjoint":
            return self.lower["hvp"], self.lower["right"]
        assert self.F_x is not None
        return self.F_x, self.lower["cross"]


@dataclass
class Oracle:
    """The quantities in `wanted` on one sample; evaluated, and counted, once for each point asked for."""

    sample: Batches
    at: Triple
    previous: Triple
    wanted: tuple[str, ...]
    upper_gradients: dict[tuple[int, int], Any] = field(default_factory=dict)
    """∇F by (loss, point): one batch of F serves all adjoint steps at a point."""
    _blocks: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def now(self) -> OracleValues:
        return self._evaluate(self.sample, self.at)

    @cached_property
    def before(self) -> OracleValues:
        return self._evaluate(self.sample, self.previous)

    @cached_property
    def full(self) -> OracleValues:
        return self._evaluate(self.sample.whole(), self.at)

    @property
    def latest(self) -> OracleValues:
        """What was evaluated at the present point."""
        return self.full if "full" in vars(self) else self.now

    def block(self, share: str) -> tuple[int, int]:
        """(block, number of blocks) of the first lower, or upper, batch."""
        found = self._blocks.get(share)
        if found is None:
            found = self._blocks[share] = block_of(getattr(self.sample, share)[0])
        return found

    def _evaluate(self, sample: Batches, at: Triple) -> OracleValues:
        point = Point(at.x, at.y)
        if self.wanted == ("lower",):
            row = _mean(sample.lower, lambda loss: _slope(loss, point))
            return OracleValues(row, row["value"]["G"])
        upper = _mean(sample.upper, lambda loss: self._gradients(loss, point))
        F, F_x, F_y = upper["value"]["F"], upper["x"], upper["y"]
        if sample.series is None:
            v, products = at.v, ("hvp", "cross")
        else:
            v, products = sample.series.apply(sample.factors, point, F_y), ("cross",)
        products = tuple(p for p in products if _QUANTITY[p] in self.wanted)
        lower = _mean(sample.lower, lambda loss: _row(loss, point, v, products, F_y))
        return OracleValues(lower, lower["value"]["G"], F, F_x)

    def _gradients(self, loss: Loss, point: Point) -> dict[str, Params]:
        key = id(loss), id(point.y)
        if key not in self.upper_gradients:
            # the loss and y are kept with their gradients, so that their ids stay theirs
            self.upper_gradients[key] = gradients(loss, point), loss, point.y
        F, F_x, F_y = self.upper_gradients[key][0]
        return {"value": {"F": F}, "x": F_x, "y": F_y}


@dataclass
class Draw:
    """One quantity of an oracle, as `bilevel.directions.quantity.StochasticQuantity` has it."""

    oracle: Oracle
    quantity: str

    def now(self) -> Params:
        return self.oracle.now.total(self.quantity)

    def before(self) -> Params:
        return self.oracle.before.total(self.quantity)

    def full(self) -> Params:
        return self.oracle.full.total(self.quantity)

    def shares(self) -> dict[str, Params]:
        return self.oracle.now.shares(self.quantity)

    def block(self, share: str) -> tuple[int, int]:
        return self.oracle.block(share)


_QUANTITY = {"hvp": "adjoint", "cross": "upper"}


def _slope(loss: Loss, point: Point) -> dict[str, Params]:
    G, slope = gradient_y(loss, point.x, point.y)
    return {"value": {"G": G}, "slope": slope}


def _row(
    loss: Loss, point: Point, v: Params, products: tuple[str, ...], right: Params | None = None
) -> dict[str, Params]:
    """∇y G and products with v on a batch."""
    lower = linearize(loss, point)
    row = {"value": {"G": lower.value}, "slope": lower.gradient}
    if products == ("hvp", "cross"):
        row["hvp"], row["cross"] = lower.pull(v)
    elif "hvp" in products:
        row["hvp"] = lower.hvp_yy(v)
    elif "cross" in products:
        row["cross"] = lower.vjp_xy(v)
    if right is not None:
        row["right"] = lower.restrict(right)
    return row


def _mean(losses: list[Loss], row: Callable[[Loss], dict[str, Params]]) -> dict[str, Params]:
    """Of what `row` makes of each; one graph at a time is in memory."""
    if len(losses) == 1:
        return row(losses[0])
    mean = {name: tree.scale(1.0, part) for name, part in row(losses[0]).items()}
    for loss in losses[1:]:
        for name, part in row(loss).items():
            tree.axpy_(mean[name], 1.0, part)
    return {name: tree.scale_(part, 1 / len(losses)) for name, part in mean.items()}
