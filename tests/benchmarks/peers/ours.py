"""This library, through the functional core."""

from __future__ import annotations

from bilevel import hypergradient
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.linear.cg import CG
from bilevel.linear.neumann import Neumann
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.types import Point
from tests.benchmarks.tasks import SCALE, Params, Task


def ask(task: Task, estimator) -> Params:
    return hypergradient(
        task.upper,
        task.lower,
        task.x,
        task.y,
        estimator=estimator,
        upper_batch=task.held_out,
        lower_batch=task.train,
        state=estimator.init(Point(task.x, task.y)),
    ).hypergradient


def cg(task: Task) -> Params:
    return ask(task, Implicit(solver=CG(iterations=task.work, tolerance=0.0)))


def neumann(task: Task) -> Params:
    # the first of our terms needs no product
    return ask(task, Implicit(solver=Neumann(iterations=task.work + 1, scale=SCALE)))


def unroll(**options):
    def run(task: Task) -> Params:
        optimizer = SGD(lr=task.lr, momentum=task.momentum)
        steps = Gradient(steps=task.work, optimizer=optimizer)
        return ask(task, Unroll(along=steps, **options))

    return run


METHODS = {
    "bilevel": {"cg": cg, "neumann": neumann},
    "bilevel, store": {"unroll": unroll()},
    "bilevel, recompute": {"unroll": unroll(memory="recompute")},
    "bilevel, traced": {"unroll": unroll(memory="traced")},
    "bilevel, mixed": {"unroll": unroll(memory="mixed")},
    "bilevel, checkpoint": {"unroll": unroll(memory="checkpoint")},
    "bilevel, reversible": {"unroll": unroll(memory="reversible")},
}
