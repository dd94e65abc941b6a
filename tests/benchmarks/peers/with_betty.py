"""betty-ml 0.2.1: `betty.hypergradient.get_grads` on a node that has what it reads.

It unrolls one step at most. Its conjugate gradient updates the direction with the old residual.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from betty.hypergradient import get_grads  # pyright: ignore[reportMissingImports]

from tests.benchmarks.tasks import EPSILON, SCALE, Module, Params, Task


class Node:
    """The part of `betty.problems.Problem` that the hypergradient reads."""

    _strategy = "default"
    paths: tuple[()] = ()

    def __init__(self, entries, loss, **config) -> None:
        self._entries, self._loss = list(entries), loss
        self.config, self.cur_batch = SimpleNamespace(**config), None

    def training_step_exec(self, batch):
        return self._loss()

    def parameters(self):
        return self._entries

    trainable_parameters = meta_trainable_parameters = parameters


def implicit(task: Task, **config) -> Params:
    module: Module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    upper = Node(x.values(), None)
    lower = Node(module.parameters(), lambda: task.lower(x, module(), task.train), **config)
    loss = task.upper(x, module(), task.held_out)
    return dict(zip(x, get_grads(loss, [upper, lower, upper], True, False), strict=True))


def cg(task: Task) -> Params:
    return implicit(task, type="cg", cg_iterations=task.work, cg_alpha=1.0)


def neumann(task: Task) -> Params:
    return implicit(task, type="neumann", neumann_iterations=task.work, neumann_alpha=SCALE)


def one_step(task: Task) -> Params:
    """Its "darts" at y, the vector from the step of SGD that it leaves to an optimizer."""
    module: Module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    upper = Node(x.values(), None)
    lower = Node(
        module.parameters(),
        lambda: task.lower(x, module(), task.train),
        type="darts",
        darts_alpha=EPSILON,
        darts_multitask=False,
    )
    entries = list(module.parameters())
    G_y = torch.autograd.grad(task.lower(x, module(), task.train), entries)
    stepped = {n: e - task.lr * g for (n, e), g in zip(module().items(), G_y, strict=True)}
    loss = task.upper(x, stepped, task.held_out)
    found = get_grads(loss, [upper, lower, upper], True, False)
    return {name: task.lr * part for name, part in zip(x, found, strict=True)}


METHODS = {"betty-ml": {"cg": cg, "neumann": neumann, "one step": one_step}}
