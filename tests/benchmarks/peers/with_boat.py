"""boat-torch 1.1.1: its operations CG, NS, RAD and FD, with the lower steps of its NGD (higher's)."""

from __future__ import annotations

import higher  # pyright: ignore[reportMissingImports]
import torch
from boat_torch.na_ol import CG, FD, NS, RAD  # pyright: ignore[reportMissingImports]
from boat_torch.utils.op_utils import cg_step  # pyright: ignore[reportMissingImports]

from tests.benchmarks.hold import Held, Told
from tests.benchmarks.tasks import EPSILON, SCALE, Params, Task
from tests.benchmarks.whole import Prepared


def operation(kind, task: Task, run, lr: float) -> Params:
    module = task.module()
    x = {name: entry.detach().clone().requires_grad_() for name, entry in task.x.items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    config = {
        "gm_op": [],
        "lower_level_opt": optimizer,
        "CG": {"tolerance": 0.0, "k": task.work},
        "FD": {"r": EPSILON},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
    }
    made = kind(
        lambda feed, upper, model, params=None: task.lower(x, model(), task.train),
        lambda feed, upper, model, params=None: task.upper(x, model(), task.held_out),
        module,
        module,
        list(module.parameters()),
        list(x.values()),
        config,
    )
    run(made, module, optimizer, x)
    return {name: entry.grad for name, entry in x.items() if entry.grad is not None}


def _implicit(made, module, optimizer, x) -> None:
    made.compute_gradients({}, {}, module)


def cg(task: Task) -> Params:
    return operation(CG, task, _implicit, task.lr)


def neumann(task: Task) -> Params:
    # it takes I − lr · H for the series: its lr is the scale
    return operation(NS, task, _implicit, SCALE)


def unroll(task: Task) -> Params:
    def run(made, module, optimizer, x) -> None:
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (net, steps):
            for _ in range(task.work):
                steps.step(task.lower(x, net(), task.train))
            made.compute_gradients({}, {}, net)

    return operation(RAD, task, run, task.lr)


def one_step(task: Task) -> Params:
    """Its FD: the step of SGD is higher's, differences are taken at the module's own y."""

    def run(made, module, optimizer, x) -> None:
        with higher.innerloop_ctx(module, optimizer, track_higher_grads=False) as (net, steps):
            steps.step(task.lower(x, net(), task.train))
            made.compute_gradients({}, {}, net)

    return operation(FD, task, run, task.lr)


def held(task: Held) -> Told:
    """Its conjugate gradient, from zero, its tolerance relative to the right-hand side."""

    def solve(product, b, v, tolerance):
        bound = tolerance * float(b.norm())
        return cg_step(lambda vs: [product(vs[0])], [b], max_iter=1000, epsilon=bound)[0]

    return Told(task, solve)


METHODS = {
    "boat-torch": {
        "cg": cg,
        "neumann": neumann,
        "unroll": unroll,
        "one step": one_step,
        "products": Prepared(held),
    }
}
