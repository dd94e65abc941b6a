"""Few-shot regression of sine waves: learn where a small network should start to adapt.

    y_0 = x,    G(x, y) = MSE on a task's shots + ½ proximal ‖y − x‖²,    F(y) = MSE on its queries

Finn, Abbeel and Levine (2017), arXiv:1703.03400, sec. 5.1: amplitudes in [0.1, 5], phases in
[0, π], inputs in [-5, 5], a network of two hidden layers of 40. This is one task at a time;
`over_tasks` batches many. With `proximal` it is the lower level of iMAML, Rajeswaran et al.
(2019), arXiv:1909.04630, eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from bilevel import rng, tree
from bilevel.components import component
from bilevel.functional import solve_lower
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.over_tasks import OverTasks
from bilevel.rng import Streams
from bilevel.types import Params

Task = tuple[Params, Params]
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


@component
class Sinusoid:
    """x: the weights that adaptation starts from. y: those adapted to a few points of one wave.

    `evaluate` adapts x to `num_held_out` waves never trained on, by `held_out_steps` gradient
    steps of size `held_out_lr`, and gives their mean squared error before and after.
    """

    shots: PositiveInt = 10
    queries: PositiveInt = 10
    width: PositiveInt = 40
    activation: Literal["relu", "tanh"] = "tanh"
    proximal: NonNegativeFloat = 0.0
    num_held_out: PositiveInt = 100
    held_out_steps: PositiveInt = 5
    held_out_lr: PositiveFloat = 0.02
    data_seed: int = 0

    def init(self, streams: Streams) -> tuple[Params, Params]:
        sizes = (1, self.width, self.width, 1)
        x: Params = {}
        for i in range(3):
            shape = sizes[i + 1], sizes[i]
            x[f"weight{i}"] = sizes[i] ** -0.5 * torch.randn(shape, generator=streams["init"])
            x[f"bias{i}"] = torch.zeros(sizes[i + 1])
        return x, tree.clone(x)

    def lower_start(self, x: Params, y: Params) -> Params:
        return x

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        loss = self._error(y, batch)
        if not self.proximal:
            return loss
        parts = [(y[name] - x[name]).square().sum() for name in x]
        return loss + 0.5 * self.proximal * torch.stack(parts).sum()

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return self._error(y, batch)

    def episodes(self, stream: torch.Generator) -> Iterator[Task]:
        """(shots, queries) of one wave after another."""
        while True:
            amplitude = 0.1 + 4.9 * torch.rand((), generator=stream)
            phase = math.pi * torch.rand((), generator=stream)
            a = 10 * torch.rand(self.shots + self.queries, 1, generator=stream) - 5
            wave = {"a": a, "b": amplitude * torch.sin(a - phase)}
            yield (
                {name: part[: self.shots] for name, part in wave.items()},
                {name: part[self.shots :] for name, part in wave.items()},
            )

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return (queries for _, queries in self.episodes(stream))

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return (shots for shots, _ in self.episodes(stream))

    @cached_property
    def held_out(self) -> tuple[OverTasks, Task]:
        """The waves to evaluate on: one problem of many tasks, and its batches."""
        tasks = OverTasks(problem=self, num_tasks=self.num_held_out)
        return tasks, next(tasks.episodes(rng.stream(self.data_seed, "sinusoid.held_out")))

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        """Mean squared error on held-out waves, before and after adapting to their shots."""
        tasks, batches = self.held_out
        like = x["weight0"]
        shots, queries = tree.to(batches, like.device, like.dtype)
        start = tasks.lower_start(x, tree.map(lambda p: p.expand(self.num_held_out, *p.shape), x))
        solver = Gradient(steps=self.held_out_steps, optimizer=SGD(lr=self.held_out_lr))
        adapted = solve_lower(tasks.lower_loss, x, start, solver=solver, batch=shots).y
        with torch.no_grad():
            return {
                "error before adapting": float(tasks.upper_loss(x, start, queries)),
                "error after adapting": float(tasks.upper_loss(x, adapted, queries)),
            }

    def _error(self, y: Params, batch: Any) -> Tensor:
        act, h = ACTIVATIONS[self.activation], batch["a"]
        for i in range(3):
            h = h @ y[f"weight{i}"].mT + y[f"bias{i}"]
            h = act(h) if i < 2 else h
        return (h - batch["b"]).square().mean()
