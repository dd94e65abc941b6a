"""higher 0.2.1: `innerloop_ctx`. It unrolls and nothing else."""

from __future__ import annotations

import higher  # pyright: ignore[reportMissingImports]
import torch

from tests.benchmarks.tasks import Params, Task


def unroll(task: Task) -> Params:
    module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=task.lr)
    with higher.innerloop_ctx(module, optimizer) as (net, steps):
        for _ in range(task.work):
            steps.step(task.lower(x, net(), task.train))
        value = task.upper(x, net(), task.held_out)
        return dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))


METHODS = {"higher": {"unroll": unroll}}
