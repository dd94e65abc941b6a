"""MAML here beside plain torch by hand, interleaved: `python -m tests.benchmarks.maml`.

The same hypergradient of `sinusoid`, through 5 steps of SGD from a start that all tasks share: by the
library, batched by `over_tasks` with nothing but the two losses of one task, in a run and by
`solve_lower` and `hypergradient`, which check more; by a loop over the tasks; by `vmap` of
`torch.func.grad`; and by the network written out for a batch of tasks, which knows that it is linear
layers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.func import grad, vmap

from bilevel import tree
from bilevel.estimators.unroll import Unroll
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.levels import Levels, point_of
from bilevel.problem.over_tasks import OverTasks
from bilevel.rng import Streams
from bilevel.types import Params
from bilevel_problems.sinusoid import Sinusoid
from tests.benchmarks.batched import ask

STEPS, LR, WARM_UP = 5, 0.02, 3
Way = Callable[[Params, Params, Params], Params]


def error(y: Params, batch: Params) -> Tensor:
    """Of one task; or, of as many as there are first axes, of each."""
    h = batch["a"]
    for i in range(3):
        h = h @ y[f"weight{i}"].mT + y[f"bias{i}"].unsqueeze(-2)
        h = h.tanh() if i < 2 else h
    return (h - batch["b"]).square().mean((-2, -1))


def by_loop(x: Params, shots: Params, queries: Params) -> Params:
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    found = []
    for i in range(len(shots["a"])):
        shot, query = ({n: v[i] for n, v in part.items()} for part in (shots, queries))
        y = x
        for _ in range(STEPS):
            slopes = torch.autograd.grad(error(y, shot), list(y.values()), create_graph=True)
            y = {n: v - LR * g for (n, v), g in zip(y.items(), slopes, strict=True)}
        found.append(error(y, query))
    slopes = torch.autograd.grad(torch.stack(found).mean(), list(x.values()))
    return dict(zip(x, slopes, strict=True))


def by_vmap(x: Params, shots: Params, queries: Params) -> Params:
    def adapted(x: Params, shot: Params, query: Params) -> Tensor:
        y = x
        for _ in range(STEPS):
            slopes = grad(error)(y, shot)
            y = {n: v - LR * slopes[n] for n, v in y.items()}
        return error(y, query)

    return grad(lambda x: vmap(adapted, (None, 0, 0))(x, shots, queries).mean())(x)


def by_hand(x: Params, shots: Params, queries: Params) -> Params:
    """All tasks in one matrix product a layer."""
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    tasks = len(shots["a"])
    y = {name: value.expand(tasks, *value.shape) for name, value in x.items()}
    for _ in range(STEPS):
        loss = error(y, shots).sum()
        slopes = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        y = {n: v - LR * g for (n, v), g in zip(y.items(), slopes, strict=True)}
    slopes = torch.autograd.grad(error(y, queries).mean(), list(x.values()))
    return dict(zip(x, slopes, strict=True))


def by_torchopt(x: Params, shots: Params, queries: Params) -> Params:
    """torchopt 0.7.3 (`pip install torchopt optree`): a loop over the tasks, as its examples have it."""
    import torchopt  # pyright: ignore[reportMissingImports]

    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    sgd, found = torchopt.sgd(LR), []
    for i in range(len(shots["a"])):
        shot, query = ({n: v[i] for n, v in part.items()} for part in (shots, queries))
        y = tuple(x.values())
        state = sgd.init(y)
        for _ in range(STEPS):
            loss = error(dict(zip(x, y, strict=True)), shot)
            slopes = torch.autograd.grad(loss, y, create_graph=True)
            updates, state = sgd.update(slopes, state, inplace=False)
            y = torchopt.apply_updates(y, updates, inplace=False)
        found.append(error(dict(zip(x, y, strict=True)), query))
    slopes = torch.autograd.grad(torch.stack(found).mean(), list(x.values()))
    return dict(zip(x, slopes, strict=True))


WAYS: dict[str, Way] = {"by hand": by_hand, "vmap": by_vmap, "loop": by_loop}
if find_spec("torchopt"):  # in an environment of your own: this project does without it
    WAYS["torchopt"] = by_torchopt


def problem(num_tasks: int) -> OverTasks:
    return OverTasks(problem=Sinusoid(), num_tasks=num_tasks)


def as_a_run(num_tasks: int, dtype: torch.dtype) -> Callable[[], Params]:
    """The lower solve and the estimate of an upper step, as `bilevel run` and `minimize` take it."""
    levels, streams = Levels(problem(num_tasks)), Streams(0)
    drawn = levels.problem.init(streams), next(levels.problem.episodes(streams["waves"]))
    (x, y), (shots, queries) = tree.to(drawn, torch.device("cpu"), dtype)
    solver, estimator = Gradient(steps=STEPS, optimizer=SGD(lr=LR)), Unroll()
    needs = estimator.needs

    def work() -> Params:
        batches = itertools.repeat(shots)
        solution = levels.solve(solver, x, y, batches=batches, record=needs.path, graph=needs.graph)
        losses = levels.losses(queries, shots)
        return estimator.estimate(losses, point_of(x, solution), {}).hypergradient

    return work


def works(num_tasks: int, dtype: torch.dtype) -> dict[str, Callable[[], Params]]:
    """A call of each way at the same x, on the same tasks."""
    made = problem(num_tasks)
    streams = Streams(0)
    x, _ = made.init(streams)
    shots, queries = next(made.episodes(streams["waves"]))
    x, shots, queries = ({n: v.to(dtype) for n, v in part.items()} for part in (x, shots, queries))
    here = ask(made, Unroll(), dtype)
    return {
        "a run": as_a_run(num_tasks, dtype),
        "`hypergradient`": lambda: here().hypergradient,
        **{name: lambda way=way: way(x, shots, queries) for name, way in WAYS.items()},
    }


def times(num_tasks: int, repetitions: int = 9) -> dict[str, list[float]]:
    """CPU seconds of each way, taken in turn; the first rounds, in which losses are recorded, are left out."""
    calls = works(num_tasks, torch.float32)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions + WARM_UP):
        for name, call in calls.items():
            began = time.process_time()
            call()
            found[name].append(time.process_time() - began)
    return {name: each[WARM_UP:] for name, each in found.items()}


def ratio(found: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of the ratio within one."""
    pairs = zip(found[name], found[other], strict=True)
    return statistics.median(one / two for one, two in pairs)


def main() -> None:
    torch.set_num_threads(1)
    names, others = (
        ("a run", "`hypergradient`", *WAYS),
        [name for name in WAYS if name != "by hand"],
    )
    ratios = ["a run / by hand", *(f"{name} / a run" for name in others)]
    print("| tasks | " + " | ".join([*names, *ratios]) + " |")
    print("|---|" + "---|" * (len(names) + len(ratios)))
    for num_tasks in (8, 32, 128):
        found = times(num_tasks)
        cells = [f"{1000 * statistics.median(found[name]):.0f} ms" for name in names]
        cells += [f"{ratio(found, 'a run', 'by hand'):.2f}"]
        cells += [f"{ratio(found, name, 'a run'):.1f}" for name in others]
        print("| " + " | ".join([str(num_tasks), *cells]) + " |")


if __name__ == "__main__":
    main()
