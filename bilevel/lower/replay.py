"""Lower steps that keep their graph: y_K as a differentiable function of x (and of y_0)."""

from __future__ import annotations

from typing import Any

import torch

from bilevel import calculus
from bilevel.types import Loss, Params, Path


def step(
    path: Path, loss: Loss, x: Params, y: Params, state: Any, batch: Any
) -> tuple[Params, Any]:
    """One step of the path with its graph from (x, y, state) kept. 1 gradient."""
    loss = loss.on(batch)
    with torch.enable_grad(), calculus.second_order(loss):
        value = calculus.value(loss, x, y)
        loss.counts.gradients += 1
        found = torch.autograd.grad(value, list(y.values()), create_graph=True, allow_unused=True)
        calculus.require_graph(loss, found)
        g = {
            name: torch.zeros_like(entry) if part is None else part
            for (name, entry), part in zip(y.items(), found, strict=True)
        }
        y, state = path.optimizer.step(y, g, state)
        return (path.project(y) if path.project else y), state


def replay(path: Path, loss: Loss, x: Params) -> Params:
    """y_K with the graph of all its K steps back to x and y_0. K gradients, memory K graphs."""
    y = {
        name: entry if entry.requires_grad else entry.detach().requires_grad_()
        for name, entry in path.start.items()
    }
    state = path.state
    for batch in path.batches:
        y, state = step(path, loss, x, y, state, batch)
    return y


def advance(path: Path, loss: Loss, x: Params, steps: int) -> Path:
    """The path with its first `steps` steps taken, without a graph. `steps` gradients."""
    y, state = path.start, path.state
    for batch in path.batches[:steps]:
        _, g = calculus.gradient_y(loss.on(batch), x, y)
        with torch.no_grad():
            y, state = path.optimizer.step(y, g, state)
            y = path.project(y) if path.project else y
    return Path(path.optimizer, y, state, path.batches[steps:], path.project)
