"""torchopt 0.7.3: `custom_root` with its linear solvers, and `MetaSGD` for unrolling.

Its conjugate gradient takes one more product than steps, for the residual at a start of zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torchopt.diff.implicit import custom_root  # pyright: ignore[reportMissingImports]
from torchopt.linear_solve import solve_cg, solve_inv  # pyright: ignore[reportMissingImports]

from tests.benchmarks import loop, maml
from tests.benchmarks.hold import Held, Told
from tests.benchmarks.tasks import SCALE, Params, Task
from tests.benchmarks.whole import Loop, Maml, Prepared


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


def whole_loop(task: Loop) -> Params:
    """Its `sgd`, `custom_root` with its conjugate gradient from the last adjoint, its `adam`."""
    (A, b), (C, d) = (
        (loop.PROBLEM.splits[name]["A"], loop.PROBLEM.splits[name]["b"])
        for name in ("lower", "upper")
    )
    softplus = torch.nn.functional.softplus

    def lower(w: Tensor, x: Tensor) -> Tensor:
        return softplus(-b * (A @ w)).mean() + 0.5 * (x.exp() * w**2).sum()

    adjoint: list[Tensor | None] = [None]

    def solve(matvec, right):
        solver = solve_cg(init=adjoint[0], maxiter=loop.CG_STEPS, rtol=0.0, atol=0.0)
        adjoint[0] = solver(matvec, right)
        return adjoint[0]

    slope = torch.func.grad(lower)

    @custom_root(slope, argnums=1, solve=solve)
    def solution(w, x):
        return w

    x = torch.full((loop.FEATURES,), loop.PROBLEM.initial_log_penalty, dtype=torch.float64)
    w = torch.zeros_like(x)
    sgd, adam = torchopt.sgd(loop.LR), torchopt.adam(loop.UPPER_LR)
    descent, ascent = sgd.init([w]), adam.init([x])
    for _ in range(task.steps):
        for _ in range(loop.LOWER_STEPS):
            updates, descent = sgd.update([slope(w, x)], descent)
            (w,) = torchopt.apply_updates([w], updates)
        x.requires_grad_()
        value = softplus(-d * (C @ solution(w, x))).mean()
        h = torch.autograd.grad(value, x)
        x = x.detach()
        updates, ascent = adam.update(list(h), ascent)
        (x,) = torchopt.apply_updates([x], updates)
    return {"log_penalty": x}


def maml_loop(task: Maml) -> Callable[[], Params]:
    """A loop over the tasks, as its examples have it, with its differentiable `sgd`."""
    x, shots, queries = task.drawn()

    def work() -> Params:
        leaves = {name: entry.detach().requires_grad_() for name, entry in x.items()}
        names, sgd, found = list(leaves), torchopt.sgd(maml.LR), []
        for i in range(task.num_tasks):
            shot, query = ({n: v[i] for n, v in part.items()} for part in (shots, queries))
            y = tuple(leaves.values())
            state = sgd.init(y)
            for _ in range(maml.STEPS):
                loss = maml.error(dict(zip(names, y, strict=True)), shot)
                slopes = torch.autograd.grad(loss, y, create_graph=True)
                updates, state = sgd.update(slopes, state, inplace=False)
                y = torchopt.apply_updates(y, updates, inplace=False)
            found.append(maml.error(dict(zip(names, y, strict=True)), query))
        slopes = torch.autograd.grad(torch.stack(found).mean(), list(leaves.values()))
        return dict(zip(names, slopes, strict=True))

    return work


def held(task: Held) -> Told:
    """Warm-started, which its solver can be."""
    return Told(
        task,
        lambda product, b, v, tolerance: solve_cg(init=v, rtol=tolerance, maxiter=1000)(product, b),
    )


METHODS = {
    "torchopt": {
        "products": Prepared(held),
        "cg": cg,
        "neumann": neumann,
        "unroll": unroll,
        "loop": whole_loop,
        "maml": Prepared(maml_loop),
    }
}
