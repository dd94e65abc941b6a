"""higher 0.2.1: `innerloop_ctx`. It unrolls and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import higher  # pyright: ignore[reportMissingImports]
import torch
from torch import nn

from tests.benchmarks import maml
from tests.benchmarks.tasks import Params, Task
from tests.benchmarks.whole import Maml, Prepared


def unroll(task: Task) -> Params:
    module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=task.lr)
    with higher.innerloop_ctx(module, optimizer) as (net, steps):
        for _ in range(task.work):
            steps.step(task.lower(x, net(), task.train))
        value = task.upper(x, net(), task.held_out)
        return dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))


class Net(nn.Module):
    """The parameters of a network, which `higher` can patch."""

    def __init__(self, x: Params) -> None:
        super().__init__()
        self.names = list(x)
        for name, entry in x.items():
            setattr(self, name, nn.Parameter(entry.detach().clone()))

    def forward(self) -> Params:
        return {name: getattr(self, name) for name in self.names}


def maml_loop(task: Maml) -> Callable[[], Params]:
    """A loop over the tasks, as its examples have it."""
    x, shots, queries = task.drawn()
    net = Net(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=maml.LR)

    def work() -> Params:
        net.zero_grad()
        for i in range(task.num_tasks):
            shot, query = ({n: v[i] for n, v in part.items()} for part in (shots, queries))
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (y, steps):
                for _ in range(maml.STEPS):
                    steps.step(maml.error(y(), shot))
                (maml.error(y(), query) / task.num_tasks).backward()
        return {name: getattr(net, name).grad.clone() for name in net.names}

    return work


METHODS = {"higher": {"unroll": unroll, "maml": Prepared(maml_loop)}}
