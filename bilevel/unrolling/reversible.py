"""SGD with momentum run backwards, bit for bit. Maclaurin, Duvenaud and Adams (2015), arXiv:1502.03492.

Their algorithm 2 takes y and the velocity v = lr · momentum average back through the step

    v' = β v + lr (1 − dampening) (∇y G(x, y) + weight_decay y),    y' = y − v'

by y = y' + v', then v = (v' − …) / β. In floating point that drifts: a step back multiplies
volumes by 1 / β a number. So y
and v are whole multiples of `UNIT` here, sums of them are exact, and what rounding β v to one loses is
kept. Their algorithm 3 keeps log2(1 / β) bits of each number, and is off by up to n units for
β = n / d; here the product is the nearest multiple, and what is kept says which of the numbers that
have this product it was: 2 (1 − β) bits of a number on average for β ≥ 1/2, none where only one has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.products import Linearization
from bilevel.errors import ProblemError
from bilevel.optimizers.adjusted import Adjusted
from bilevel.optimizers.differentiable import SGD
from bilevel.optimizers.learned import Learned, learned
from bilevel.types import Loss, Losses, Params, Path, Point
from bilevel.unrolling.path import advance, pull_start

UNIT = 2.0**-46
LIMIT = 2.0**14
"""|y| stays below: UNIT and LIMIT leave the sums of a step three bits of 64 to spare."""

SMALLEST = 2.0**-8
"""The smallest momentum: below it a step would lose more than eight bits of each number."""


def differentiate(path: Path, losses: Losses, x: Params) -> tuple[Tensor, Params]:
    """(F(x, y_K), its gradient in x through the steps): their algorithm 2.

    2K + 1 gradients, K HVPs, K cross products. Raises what `sgd` and `Reel` do.
    """
    optimizer = sgd(path, losses.lower)
    reel = Reel(replace(path, start=advance(path, losses.lower, x, 0).start), losses.lower, x)
    reel.forwards()
    value, total, at_y = calculus.gradients(losses.upper, Point(x, reel.y))
    at_v = tree.zeros_like(at_y)
    for lower, factor in reel.backwards():
        at_v = tree.axpy_(at_v, -1.0, at_y)  # y' = y − v'
        product, cross = lower.pull(at_v)
        tree.axpy_(total, factor, cross)
        tree.axpy_(at_y, factor, product)
        tree.axpy_(at_y, factor * optimizer.weight_decay, at_v)
        tree.scale_(at_v, optimizer.momentum)
    return value, tree.axpy_(total, 1.0, pull_start(path, losses.lower, x, at_y))


class Momentum(NamedTuple):
    """The numbers of an SGD whose steps can be run backwards."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float


def sgd(path: Path, loss: Loss) -> Momentum:
    """The optimizer of a path, if its steps can be run backwards.

    Raises:
        ProblemError: they cannot.
    """
    optimizer, why = path.optimizer, ""
    if isinstance(optimizer, Adjusted):
        why = "they are clipped or follow a schedule, and a step is undone at one rate, of all of ∇y G"
    elif not isinstance(optimizer, SGD):
        why = f"{type(optimizer).__name__} is not SGD"
    elif learned(optimizer):
        why = f"{', '.join(learned(optimizer))} is learned, and a step is undone by whole numbers"
    elif not SMALLEST <= (momentum := _number(optimizer.momentum)) <= 1:
        why = f"momentum = {momentum}, outside [1/256, 1]: what came before is forgotten"
    elif optimizer.nesterov:
        why = "a Nesterov step moves y by the very gradient that is to be found from where it ends"
    elif loss.structure.project:
        why = "a projection forgets where it projected from"
    else:
        lr, decay = _number(optimizer.lr), _number(optimizer.weight_decay)
        return Momentum(lr, momentum, optimizer.dampening, decay)
    raise ProblemError(
        f"memory: reversible runs the lower steps backwards, and these cannot be: {why}; take "
        "optimizer: {name: sgd, momentum: 0.9}, or set memory: recompute or checkpoint"
    )


def _number(option: float | Learned) -> float:
    assert not isinstance(option, Learned)
    return option


@dataclass(frozen=True)
class Ratio:
    """Whole numbers times n / d, rounded to the nearest, and back; n ≤ d < 2³⁰."""

    n: int
    d: int

    @classmethod
    def near(cls, value: float) -> Ratio:
        """The nearest ratio to a number in (0, 1]: that of a decimal of eight digits is itself."""
        found = Fraction(value).limit_denominator(2**30 - 1)
        return cls(found.numerator, found.denominator)

    @property
    def width(self) -> int:
        """Bits that tell the numbers of one product apart."""
        return (math.ceil(self.d / self.n) - 1).bit_length()

    def times(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(⌊v n / d + 1/2⌋, the bits that `back` needs beside it)."""
        # v = whole · d + rest: no intermediate is larger than v or 2 d²
        whole, rest = _divide(v, self.d)
        nearest, left = _divide(rest.mul_(2 * self.n).add_(self.d), 2 * self.d)
        # the number before v has this product too where it leaves no less than 0, the next one
        # where it leaves less than 2 d
        ambiguous = (left >= 2 * self.n) | (left < 2 * (self.d - self.n))
        digit = torch.div(left[ambiguous], 2 * self.n, rounding_mode="floor")
        return whole.mul_(self.n).add_(nearest), _pack(digit, self.width)

    def back(self, product: Tensor, lost: Tensor) -> Tensor:
        """The number whose product, and lost bits, these are; ValueError where they cannot be."""
        # the first number of this product is ⌈(2 product − 1) d / 2n⌉, and the first of the next
        # 2d / 2n = whole + rest / 2n further, rounded up: one more where `over` is below rest
        v, rest = _divide(2 * product - 1, 2 * self.n)
        more, over = _divide(rest.mul_(self.d).add_(2 * self.n - 1), 2 * self.n)
        over.neg_().add_(2 * self.n - 1)
        v.mul_(self.d).add_(more)
        whole, rest = divmod(2 * self.d, 2 * self.n)
        ambiguous = over < rest if whole == 1 else torch.ones_like(over, dtype=torch.bool)
        count = int(ambiguous.sum())
        if lost.numel() != -(-count * self.width // 8):
            raise ValueError("these are the bits of another product")
        v[ambiguous] += _unpack(lost, self.width, count)
        return v


def _divide(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(⌊a / b⌋, what is left)."""
    whole = torch.div(a, b, rounding_mode="floor")
    return whole, torch.sub(a, whole, alpha=b)


def _pack(numbers: Tensor, width: int) -> Tensor:
    """Numbers of `width` bits each, eight bits a byte."""
    bits = (numbers[:, None] >> torch.arange(width, device=numbers.device)) & 1
    bits = torch.nn.functional.pad(bits.reshape(-1), (0, -bits.numel() % 8))
    places = torch.arange(8, device=numbers.device)
    return (bits.reshape(-1, 8) << places).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    bits = (packed.long()[:, None] >> torch.arange(8, device=packed.device)) & 1
    bits = bits.reshape(-1)[: count * width].reshape(count, width)
    return (bits << torch.arange(width, device=packed.device)).sum(1)


class Reel:
    """The steps of a path, taken forwards and then backwards through the very same numbers.

    Holds y, v and the lost bits: nothing else grows with the number of steps. Both ways take
    ∇y G with its graph, so that they see the same bits. 1 gradient a step and direction.
    """

    def __init__(self, path: Path, loss: Loss, x: Params) -> None:
        self._optimizer = sgd(path, loss)
        self._path, self._loss, self._x = path, loss, x
        self._ratio = Ratio.near(self._optimizer.momentum)
        self._y, self._v = self._start()
        self._lost: list[Tensor] = []

    @property
    def y(self) -> Params:
        """Where the steps have come to, in the dtypes of the path's start."""
        return tree.cast(self._y.double().mul_(UNIT), self._path.start)

    @property
    def kept(self) -> int:
        """Bytes of lost bits."""
        return sum(bits.numel() for bits in self._lost)

    def forwards(self) -> None:
        """All steps. Raises `ProblemError` where y leaves ± `LIMIT`."""
        for k in range(len(self._path.batches)):
            push = self._push(k, self._linearize(k))
            self._v, lost = self._ratio.times(self._v)
            self._lost.append(lost)
            self._v += push
            self._y -= self._v
            _within(self._y.double().mul_(UNIT), k + 1)

    def backwards(self) -> Iterator[tuple[Linearization, float]]:
        """For each step, last first: ∇y G before it with its graph, and the factor it has in v'.

        Raises:
            ProblemError: the steps do not lead back to where they began.
        """
        for k in reversed(range(len(self._path.batches))):
            self._y += self._v
            lower = self._linearize(k)
            product = self._v - self._push(k, lower)
            try:
                self._v = self._ratio.back(product, self._lost.pop())
            except ValueError as error:
                raise self._astray() from error
            yield lower, self._factor(k)
        if not all(map(torch.equal, (self._y, self._v), self._start())):
            raise self._astray()

    def _astray(self) -> ProblemError:
        return ProblemError(
            "memory: reversible did not come back the way it went: ∇y of "
            f"{self._loss.level}_loss is not the same, bit for bit, when it is taken again at the "
            "same point (a random loss, or a kernel that adds in any order); make it so "
            "(torch.use_deterministic_algorithms), or set memory: recompute"
        )

    def _start(self) -> tuple[Tensor, Tensor]:
        y = _whole(_flat(self._path.start), 0)
        if not self._path.state:
            return y, torch.zeros_like(y)
        return y, _whole(self._optimizer.lr * _flat(self._path.state["momentum"]), 0)

    def _linearize(self, k: int) -> Linearization:
        loss = self._loss.on(self._path.batches[k])
        return calculus.linearize(loss, Point(self._x, self.y))

    def _factor(self, k: int) -> float:
        """lr (1 − dampening), the first step of an average undampened."""
        first = k == 0 and not self._path.state
        return self._optimizer.lr * (1.0 if first else 1 - self._optimizer.dampening)

    def _push(self, k: int, lower: Linearization) -> Tensor:
        """What step k adds to v, in whole units."""
        d = _flat(lower.gradient)
        if self._optimizer.weight_decay:
            d.add_(self._y.double(), alpha=self._optimizer.weight_decay * UNIT)
        return _whole(d.mul_(self._factor(k)), k)


def _flat(values: Params) -> Tensor:
    return tree.own(tree.map(Tensor.double, values))


def _whole(values: Tensor, k: int) -> Tensor:
    """The nearest multiples of UNIT."""
    return (_within(values, k) / UNIT).round_().long()


def _within(values: Tensor, k: int) -> Tensor:
    largest = float(torch.linalg.vector_norm(values, ord=torch.inf)) if values.numel() else 0.0
    if not largest < LIMIT:
        raise ProblemError(
            f"memory: reversible counts y and its velocity in units of 2^{math.log2(UNIT):.0f} and "
            f"up to {LIMIT:.0f}, and step {k} has {largest:.3g}; take a smaller lower.optimizer.lr, "
            "scale y, or set memory: recompute"
        )
    return values
