"""What every library is held to: the formulas typed out, once for speed and once as the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import loop, maml, stochastic
from tests.benchmarks.hold import Held
from tests.benchmarks.products import ERROR, cold_products
from tests.benchmarks.tasks import EPSILON, SCALE, Params, Task
from tests.benchmarks.whole import Loop, Maml, Prepared


def floor(task: Task) -> Params:
    """The least that `work` reused products can cost: no solver, the graph of ∇y G built once."""
    x, _y, (v, products, cross) = _linearized(task)
    for _ in range(task.work):
        v = products(v)
    return _named(x, cross(v))


def cg(task: Task) -> Params:
    """Textbook conjugate gradient, `work` steps from zero, out of place."""
    x, _, (b, products, cross) = _linearized(task)
    v, r, p = [torch.zeros_like(part) for part in b], b, b
    for _ in range(task.work):
        Ap = products(p)
        rr = _dot(r, r)
        alpha = rr / _dot(p, Ap)
        v = [a + alpha * c for a, c in zip(v, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, Ap, strict=True)]
        p = [a + _dot(r, r) / rr * c for a, c in zip(r, p, strict=True)]
    return _named(x, cross(v))


def neumann(task: Task) -> Params:
    """SCALE · Σ_{k ≤ work} (I − SCALE · H)ᵏ ∇y F."""
    x, _, (term, products, cross) = _linearized(task)
    total = term
    for _ in range(task.work):
        term = [a - SCALE * c for a, c in zip(term, products(term), strict=True)]
        total = [a + c for a, c in zip(total, term, strict=True)]
    return _named(x, cross([SCALE * part for part in total]))


def unroll(task: Task) -> Params:
    """Every step's graph kept, one backward call."""
    x, y = _leaves(task.x), _leaves(task.y)
    average = {name: torch.zeros_like(entry) for name, entry in task.y.items()}
    for _ in range(task.work):
        loss = task.lower(x, y, task.train)
        found = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        parts = dict(zip(y, found, strict=True))
        if task.momentum:
            parts = {name: task.momentum * average[name] + part for name, part in parts.items()}
            average = parts
        y = {name: entry - task.lr * parts[name] for name, entry in y.items()}
    value = task.upper(x, y, task.held_out)
    return _named(x, torch.autograd.grad(value, list(x.values())))


def one_step(task: Task) -> Params:
    """DARTS: the step of SGD, and ∇x G at y ± ε ∇y F / ‖∇y F‖ for the product."""
    x, y = _leaves(task.x), _leaves(task.y)
    G_y = torch.autograd.grad(task.lower(x, y, task.train), list(y.values()))
    stepped = {n: e.detach() - task.lr * g for (n, e), g in zip(y.items(), G_y, strict=True)}
    stepped = _leaves(stepped)
    F_y = torch.autograd.grad(task.upper(x, stepped, task.held_out), list(stepped.values()))
    size = EPSILON / _dot(F_y, F_y).sqrt()
    sides = []
    for sign in (1, -1):
        moved = {n: e.detach() + sign * size * g for (n, e), g in zip(y.items(), F_y, strict=True)}
        sides.append(torch.autograd.grad(task.lower(x, moved, task.train), list(x.values())))
    return _named(x, [-task.lr * (a - b) / (2 * size) for a, b in zip(*sides, strict=True)])


def whole_loop(task: Loop) -> Params:
    return {"log_penalty": loop.by_hand(task.steps)}


def maml_batched(task: Maml) -> Callable[[], Params]:
    drawn = task.drawn()
    return lambda: maml.by_hand(*drawn)


def maml_vmap(task: Maml) -> Callable[[], Params]:
    drawn = task.drawn()
    return lambda: maml.by_vmap(*drawn)


def maml_loop(task: Maml) -> Callable[[], Params]:
    drawn = task.drawn()
    return lambda: maml.by_loop(*drawn)


class ToldByTheTruth:
    """Cold conjugate gradient, stopped at its first good iterate, which no method could know."""

    def __init__(self, task: Held) -> None:
        self._task = task

    def products(self) -> int:
        return cold_products(self._task.points, ERROR)

    def __call__(self) -> Params:
        return self._task.truth()


ITERATIONS = Prepared(lambda task: stochastic.ByHand(task).advance)
METHODS: dict[str, dict[str, Any]] = {
    "by hand": {
        "loop": whole_loop,
        "maml": Prepared(maml_batched),
        "one step": one_step,
        **dict.fromkeys(("soba", "saba", "srba"), ITERATIONS),
    },
    "by hand, vmap": {"maml": Prepared(maml_vmap)},
    "by hand, a loop over tasks": {"maml": Prepared(maml_loop)},
    "by hand, told when to stop": {"products": Prepared(ToldByTheTruth)},
    "floor": {"cg": floor, "neumann": floor},
    "autograd, all graphs kept": {"unroll": unroll},
}
TRUTH = {"cg": cg, "neumann": neumann, "unroll": unroll, **METHODS["by hand"]}
TRUTH["products"] = Held.truth
"""Evaluated in float64."""


def _linearized(task):
    x, y = _leaves(task.x), _leaves(task.y)
    b = torch.autograd.grad(task.upper(x, y, task.held_out), list(y.values()))
    loss = task.lower(x, y, task.train)
    slope = torch.autograd.grad(loss, list(y.values()), create_graph=True)

    def products(u):
        return torch.autograd.grad(slope, list(y.values()), u, retain_graph=True)

    def cross(v):
        return [-part for part in torch.autograd.grad(slope, list(x.values()), v)]

    return x, y, (b, products, cross)


def _leaves(params: Params) -> Params:
    return {name: entry.detach().clone().requires_grad_() for name, entry in params.items()}


def _dot(a, b) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


def _named(x: Params, found) -> Params:
    return dict(zip(x, found, strict=True))
