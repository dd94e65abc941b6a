"""torchopt 0.7.3: `custom_root` with its linear solvers, and `MetaSGD` for unrolling.

Its conjugate gradient takes one more product than steps, for the residual at a start of zero.
"""

from __future__ import annotations

import torch
import torchopt  # pyright: ignore[reportMissingImports]
from torch import nn
from torchopt.diff.implicit import custom_root  # pyright: ignore[reportMissingImports]
from torchopt.linear_solve import solve_cg, solve_inv  # pyright: ignore[reportMissingImports]

from tests.benchmarks.tasks import SCALE, Params, Task


def implicit(task: Task, solve) -> Params:
    names = list(task.y)

    def loss(entries, logits):
        return task.lower({"logits": logits}, dict(zip(names, entries, strict=True)), task.train)

    @custom_root(torch.func.grad(loss, argnums=0), argnums=1, solve=solve)
    def solution(entries, logits):
        return entries

    logits = task.x["logits"].detach().clone().requires_grad_()
    entries = tuple(entry.detach().clone().requires_grad_() for entry in task.y.values())
    y = dict(zip(names, solution(entries, logits), strict=True))
    value = task.upper({"logits": logits}, y, task.held_out)
    return {"logits": torch.autograd.grad(value, logits)[0]}


def cg(task: Task) -> Params:
    return implicit(task, solve_cg(maxiter=task.work, rtol=0.0, atol=0.0))


def neumann(task: Task) -> Params:
    return implicit(task, solve_inv(ns=True, maxiter=task.work, alpha=SCALE))


def unroll(task: Task) -> Params:
    module: nn.Module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    optimizer = torchopt.MetaSGD(module, lr=task.lr)
    for _ in range(task.work):
        optimizer.step(task.lower(x, module(), task.train))
    value = task.upper(x, module(), task.held_out)
    return dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))


METHODS = {"torchopt": {"cg": cg, "neumann": neumann, "unroll": unroll}}
