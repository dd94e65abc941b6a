"""How work and memory grow with dim x, dim y, K, tasks and batch: python -m tests.benchmarks.growth.

Counted, which is the same on every machine: elements written by tensor operations (`work`), and
bytes of tensors alive at the peak (`memory`). Measured: processor seconds. An exponent is the slope
between the two largest sizes on logarithmic axes.

The problem has a cost that is linear in each size:

    G(x, y) = mean over B samples of log(1 + exp(−b aᵀy)) + ½ exp(mean of tanh x) ‖y‖²
    F(x, y) = mean over B samples of log(1 + exp(−b aᵀy))
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel import hypergradient, solve_lower
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.unroll import Unroll
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.over_tasks import OverTasks
from bilevel.types import Params
from tests.benchmarks import measured

KEPT = measured.KEPT / "growth.json"


@dataclass(frozen=True)
class Size:
    x: int = 64
    y: int = 64
    K: int = 8
    """Lower steps, and steps of conjugate gradient."""
    tasks: int = 1
    batch: int = 64


AXES: dict[str, tuple[int, ...]] = {
    "x": (4096, 16384, 65536, 262144),
    "y": (1024, 4096, 16384, 65536),
    "K": (8, 16, 32, 64, 128, 256),
    "tasks": (4, 16, 64, 256),
    "batch": (64, 256, 1024, 4096),
}
"""Sizes along each axis; the others stay, with room for what is varied to dominate."""
AROUND = {
    "K": Size(y=16384, batch=4),
    "tasks": Size(x=8, y=64, batch=16, K=4),
    "batch": Size(y=256),
}

ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "implicit, CG": lambda K: Implicit(solver=CG(iterations=K, tolerance=0.0)),
    "unroll, store": lambda K: Unroll(),
    "unroll, recompute": lambda K: Unroll(memory="recompute"),
    "unroll, checkpoint": lambda K: Unroll(memory="checkpoint"),
    "one step": lambda K: OneStep(),
}
"""By the number of steps."""


@dataclass(frozen=True)
class Linear:
    """The problem above, for one task of `over_tasks` or alone."""

    size: Size

    def upper_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        return torch.nn.functional.softplus(-batch["b"] * (batch["A"] @ y["y"])).mean()

    def lower_loss(self, x: Params, y: Params, batch: Params) -> Tensor:
        decay = x["x"].tanh().mean().exp()
        return self.upper_loss(x, y, batch) + 0.5 * decay * y["y"].square().sum()

    def init(self, streams: Any) -> tuple[Params, Params]:
        return {"x": torch.full((self.size.x,), -0.5)}, {"y": torch.zeros(self.size.y)}

    def draw(self, seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(self.size.batch, self.size.y, generator=generator) / self.size.y**0.5
        return {"A": A, "b": torch.randn(self.size.batch, generator=generator).sign()}

    def upper_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.draw(1))

    def lower_batches(self, stream: torch.Generator) -> Iterator[Params]:
        return itertools.repeat(self.draw(0))

    def evaluate(self, x: Params, y: Params) -> dict[str, float]:
        return {}

    def episodes(self, stream: torch.Generator) -> Iterator[tuple[Params, Params]]:
        while True:
            yield self.draw(0), self.draw(1)


def ask(name: str, size: Size) -> Callable[[], Any]:
    """A lower solve of K steps and a hypergradient."""
    one = Linear(size)
    problem: Any = one
    (x, y), shots, queries = one.init(None), one.draw(0), one.draw(1)
    if size.tasks > 1:
        problem = OverTasks(problem=one, num_tasks=size.tasks)
        y = {"y": y["y"].expand(size.tasks, -1).clone()}
        shots, queries = (
            {n: v.expand(size.tasks, *v.shape).clone() for n, v in part.items()}
            for part in (shots, queries)
        )
    solver = Gradient(steps=size.K, optimizer=SGD(lr=0.1))

    def work() -> Any:
        solved = solve_lower(problem.lower_loss, x, y, solver=solver, batch=shots, record=True)
        return hypergradient(
            problem.upper_loss,
            problem.lower_loss,
            x,
            solved,
            estimator=ESTIMATORS[name](size.K),
            upper_batch=queries,
            lower_batch=shots,
        )

    return work


class Alive(TorchDispatchMode):
    """Elements written by operations, and bytes of the tensors that they made, alive at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.now, self.peak = 0, 0, 0
        self._seen: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, Tensor):
                self._note(part, is_view=func.is_view)
        return found

    def _note(self, part: Tensor, *, is_view: bool) -> None:
        if is_view:
            return
        self.written += part.numel()
        storage = part.untyped_storage()
        key = storage._cdata
        if not self._seen[key]:
            self._seen[key] += 1
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def counted(call: Callable[[], Any]) -> dict[str, int]:
    call()  # what is done once is not counted
    with Alive() as found:
        kept = call()
    del kept
    return {"work": found.written, "memory": found.peak}


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The least over the rounds: nothing but other programs makes the same work take longer."""
    call()
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return min(spent)


def sizes(axis: str, along: tuple[int, ...]) -> list[Size]:
    return [replace(AROUND.get(axis, Size(batch=16)), **{axis: n}) for n in along]


def counts(name: str, axis: str, along: tuple[int, ...]) -> dict[str, list[float]]:
    """`work` and `memory` at each size."""
    found: dict[str, list[float]] = {"work": [], "memory": []}
    for size in sizes(axis, along):
        for kind, value in counted(ask(name, size)).items():
            found[kind].append(value)
    return found


def compute(rounds: int = 3) -> dict[str, Any]:
    """By axis: {"sizes", "around", "curves": {estimator: {work, memory, seconds}}}}."""
    torch.set_num_threads(1)
    axes: dict[str, Any] = {}
    for axis, along in AXES.items():
        curves = {}
        for name in ESTIMATORS:
            curves[name] = counts(name, axis, along)
            curves[name]["seconds"] = [
                seconds(ask(name, size), rounds) for size in sizes(axis, along)
            ]
        axes[axis] = {"sizes": along, "around": asdict(sizes(axis, along)[0]), "curves": curves}
        print(axis, flush=True)
    return axes


def main() -> None:
    """Measure and keep, where it has not been at this commit."""
    now = measured.commit()
    if KEPT.exists() and json.loads(KEPT.read_text(encoding="utf-8"))["commit"] == now:
        print(f"growth: measured at {now} before")
        return
    warnings.simplefilter("ignore")  # the lower solve is of K steps and says that it is not done
    KEPT.parent.mkdir(exist_ok=True)
    text = json.dumps({"commit": now, "axes": compute()}, indent=1)
    KEPT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
