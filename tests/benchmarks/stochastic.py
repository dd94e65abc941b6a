"""SOBA, SABA and SRBA beside the loops that one would write by hand, on the simulated quadratic.

The draws of blocks are those of a run, so that all ways end at the same x. By hand is plain torch,
one tensor a level, tables of SABA as tensors with a row a block, and no check of anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import rng
from bilevel.estimators.single_loop import SingleLoop
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.registry.build import build
from bilevel.rng import Streams
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel.types import Params
from bilevel_problems.simulated_quadratic import SimulatedQuadratic

LR, UPPER_LR, BATCH, PERIOD = 0.2, 0.3, 128, 64


@dataclass(frozen=True)
class Stochastic:
    """`steps` iterations of a method from the start of seed 0."""

    method: str
    steps: int = 64

    def to(self, dtype: torch.dtype) -> Stochastic:
        return self

    @cached_property
    def problem(self) -> SimulatedQuadratic:
        return SimulatedQuadratic(batch_size=BATCH)

    def start(self) -> tuple[Tensor, Tensor]:
        x, y = self.problem.init(Streams(0))
        return x["x"], y["y"]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(of G, of F) of each iteration; a full pass of SRBA draws until it has met every block."""
        counts = len(self.problem.lower["y"]), len(self.problem.upper["y"])
        levels = zip(("lower", "upper"), counts, strict=True)
        draws = [_drawn(rng.stream(0, f"{level}.batches"), count) for level, count in levels]
        for age in itertools.count():
            first = [next(draw) for draw in draws]
            if self.method == "srba" and age % PERIOD == 0:
                for draw, count, one in zip(draws, counts, first, strict=True):
                    met = {one}
                    while len(met) < count:
                        met.add(next(draw))
            yield first[0], first[1]


def _drawn(stream: torch.Generator, count: int) -> Iterator[int]:
    while True:
        yield int(torch.randint(count, (), generator=stream))


def setup(task: Stochastic, steps: int, **options: Any) -> Setup:
    """The run of an estimator of this library; SRBA's full pass is every 64 iterations there too."""
    estimator = build("estimators", {"name": task.method, "lower_lr": LR, "adjoint_lr": LR})
    assert isinstance(estimator, SingleLoop)
    upper = Upper(steps=steps, optimizer=SGD(lr=UPPER_LR))
    return Setup(task.problem, Gradient(), upper, estimator, dtype=torch.float64, **options)


class ByHand:
    """The state of a method; `advance` takes the iterations of a call."""

    def __init__(self, task: Stochastic) -> None:
        self.task, self.draws, self.age = task, task.blocks(), 0
        self.G, self.F = _split(task.problem.lower), _split(task.problem.upper)
        self.x, self.y = task.start()
        self.v = torch.zeros_like(self.y)
        self.tables: list[Tensor] = []
        self.means: list[Tensor] = []
        self.before = self.d = ()

    def advance(self) -> Params:
        step: Callable[[int, int], tuple[Tensor, ...]] = getattr(self, self.task.method)
        for i, j in itertools.islice(self.draws, self.task.steps):
            d_y, d_v, d_x = step(i, j)
            self.x, self.y, self.v = (
                self.x - UPPER_LR * d_x,
                self.y - LR * d_y,
                self.v - LR * d_v,
            )
        return {"x": self.x}

    def soba(self, i: int, j: int) -> tuple[Tensor, ...]:
        g, Hv, Jv, F_x, F_y = _five(self.G[i], self.F[j], self.x, self.y, self.v)
        return g, Hv - F_y, F_x - Jv

    def saba(self, i: int, j: int) -> tuple[Tensor, ...]:
        found = _five(self.G[i], self.F[j], self.x, self.y, self.v)
        if not self.tables:
            counts = [len(self.G)] * 3 + [len(self.F)] * 2
            self.tables = [q.new_zeros(n, len(q)) for q, n in zip(found, counts, strict=True)]
            self.means = [torch.zeros_like(q) for q in found]
        d = []
        for k, now in enumerate(found):
            table, row = self.tables[k], i if k < 3 else j
            off = now - table[row]
            d.append(off + self.means[k])
            self.means[k] = self.means[k] + off / len(table)
            table[row] = now
        return d[0], d[1] - d[4], d[3] - d[2]

    def srba(self, i: int, j: int) -> tuple[Tensor, ...]:
        here = self.x, self.y, self.v
        if self.age % PERIOD == 0:
            of_G = [_of_lower(G, *here) for G in self.G]
            of_F = [_of_upper(F, *here[:2]) for F in self.F]
            g, Hv, Jv = (torch.stack(q).mean(0) for q in zip(*of_G, strict=True))
            F_x, F_y = (torch.stack(q).mean(0) for q in zip(*of_F, strict=True))
            self.d = g, Hv - F_y, F_x - Jv
        else:
            now, old = (_five(self.G[i], self.F[j], *at) for at in (here, self.before))
            g, Hv, Jv, F_x, F_y = (a - b for a, b in zip(now, old, strict=True))
            changes = g, Hv - F_y, F_x - Jv
            self.d = tuple(a + b for a, b in zip(self.d, changes, strict=True))
        self.before, self.age = here, self.age + 1
        return self.d


def by_hand(task: Stochastic) -> Params:
    return ByHand(task).advance()


def _split(blocks: Params) -> list[Params]:
    return [{name: rows[k] for name, rows in blocks.items()} for k in range(len(blocks["y"]))]


def _quadratic(x: Tensor, y: Tensor, k: Params) -> Tensor:
    of_y = y @ (0.5 * k["yy"] @ y + x @ k["xy"] + k["y"])
    return of_y + x @ (0.5 * k["xx"] @ x + k["x"])


def _of_lower(G: Params, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    (g,) = torch.autograd.grad(_quadratic(x, y, G), y, create_graph=True)
    Hv, Jv = torch.autograd.grad(g, (y, x), v)
    return g.detach(), Hv, Jv


def _of_upper(F: Params, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(_quadratic(x, y, F), (x, y))


def _five(G: Params, F: Params, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """∇y G, ∂²yy G v, (∂²xy G)ᵀ v, ∇x F, ∇y F."""
    return *_of_lower(G, x, y, v), *_of_upper(F, x, y)
