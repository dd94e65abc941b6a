"""Tasks in one batch beside a loop over them, interleaved: `python -m tests.benchmarks.batched`."""

import statistics
import time

import torch

from bilevel import hypergradient, solve_lower, tree
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.unroll import Unroll
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.over_tasks import OverTasks
from bilevel.rng import Streams
from bilevel_problems.sinusoid import Sinusoid

ESTIMATORS = {"unroll": Unroll(), "implicit": Implicit(solver=CG(iterations=5))}


def ask(made, estimator, dtype=torch.float32):
    """A lower solve of 5 steps and a hypergradient."""
    streams = Streams(0)
    x, y = made.init(streams)
    shots, queries = next(made.episodes(streams["waves"]))
    x, y, shots, queries = tree.to((x, y, shots, queries), torch.device("cpu"), dtype)

    def work():
        solved = solve_lower(
            made.lower_loss,
            x,
            lambda x: made.lower_start(x, y),
            solver=Gradient(steps=5, optimizer=SGD(lr=0.02)),
            batch=shots,
            record=True,
        )
        return hypergradient(
            made.upper_loss,
            made.lower_loss,
            x,
            solved,
            estimator=estimator,
            upper_batch=queries,
            lower_batch=shots,
        )

    return work


def ratio(num_tasks, estimator, repetitions=5):
    """Median time of a loop over that of one batch, taken in turn."""
    batch, loop = (
        ask(OverTasks(problem=Sinusoid(proximal=2.0), num_tasks=num_tasks, batched=b), estimator)
        for b in (True, False)
    )
    times = {batch: [], loop: []}
    for _ in range(repetitions + 1):
        for work, found in times.items():
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    once, each = (statistics.median(found[1:]) for found in times.values())
    return each / once


def main():
    torch.set_num_threads(1)
    print("| tasks | " + " | ".join(f"`{name}`" for name in ESTIMATORS) + " |")
    print("|---|" + "---|" * len(ESTIMATORS))
    for num_tasks in (5, 25, 100):
        found = [ratio(num_tasks, estimator) for estimator in ESTIMATORS.values()]
        print(f"| {num_tasks} | " + " | ".join(f"{value:.1f}" for value in found) + " |")


if __name__ == "__main__":
    main()
