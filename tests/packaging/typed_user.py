"""What a user's type checker sees of the installed package. Read by `types_seen`, never run."""

import itertools
from collections.abc import Iterator
from typing import Any, assert_type

import torch
from torch import Tensor

from bilevel import component, hypergradient, minimize, solve_lower
from bilevel.estimators import Implicit, Unroll
from bilevel.linear import CG
from bilevel.lower import Gradient, Newton
from bilevel.optimizers import SGD, Adam
from bilevel.rng import Streams
from bilevel.types import LowerSolution, Params


@component
class Mine:
    """min over b of ‖b − a‖², of which the upper level asks ‖b − 1‖²."""

    size: int = 3

    def init(self, streams: Streams) -> tuple[Params, Params]:
        return {"a": torch.zeros(self.size)}, {"b": torch.zeros(self.size)}

    def upper_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return (y["b"] - 1).square().sum()

    def lower_loss(self, x: Params, y: Params, batch: Any) -> Tensor:
        return (y["b"] - x["a"]).square().sum()

    def upper_batches(self, stream: torch.Generator) -> Iterator[Any]:
        return itertools.repeat(None)

    lower_batches = upper_batches


problem, estimator = Mine(size=4), Implicit(solver=CG(iterations=5), damping=0.1)
lower = Gradient(steps=10, optimizer=SGD(lr=0.1))
result = minimize(problem, lower=lower, upper=Adam(lr=0.1), estimator=estimator, steps=5)
x, y = {"a": torch.zeros(2)}, {"b": torch.zeros(2)}
solved = solve_lower(lambda x, y: (y["b"] - x["a"]).square().sum(), x, y, solver=Newton())
found = hypergradient(
    lambda x, y: y["b"].sum(),
    lambda x, y: (y["b"] - x["a"]).square().sum(),
    x,
    solved,
    estimator=Unroll(),
)
assert_type(problem.size, int)
assert_type(estimator.damping, float)
assert_type(result.history[0].upper_loss, float)
assert_type(solved, LowerSolution)
assert_type(found.hypergradient, dict[str, Tensor])
assert_type(found.stats.residual, float | None)
Implicit(dampin=0.1)  # wrong: no such option
Mine(size="a")  # wrong: not an int
minimize(steps=3)  # wrong: no problem
