"""How far each method is off in a narrow dtype: against itself in float64, at the same point.

    python docs/estimators/precision.py          every estimator and preset that takes the problem

The problem is `quadratic` (condition number 10) at its lower solution. Methods that follow lower
steps replay the same 20; those that reuse L-BFGS pairs get them from a solve in their dtype.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from bilevel import hypergradient, registry, rng, solve_lower, tree
from bilevel.errors import BilevelError
from bilevel.lower import LBFGS, Gradient
from bilevel.optimizers import SGD
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.types import Params
from bilevel_problems.quadratic import Quadratic

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def answer(spec: Any, dtype: torch.dtype, seed: int = 0) -> Params:
    """The hypergradient that an estimator finds with everything it is given in `dtype`."""
    problem = Quadratic(data_seed=seed)
    start, _ = problem.init(rng.Streams(seed))
    x64 = tree.map(lambda p: p + 0.5, start)
    y64 = problem.lower_solution(x64)
    x, y, batch = (tree.to(part, "cpu", dtype) for part in (x64, y64, problem.constants))
    away = tree.to(tree.map(lambda p: p + 0.3, y64), "cpu", dtype)
    estimator = build("estimators", spec)
    if estimator.needs.path:
        steps = Gradient(steps=20, optimizer=SGD(lr=0.5))
        y = solve_lower(problem.lower_loss, x, away, solver=steps, batch=batch, record=True)
    if estimator.needs.pairs:
        y = solve_lower(problem.lower_loss, x, away, solver=LBFGS(), batch=batch)
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=batch,
        lower_batch=batch,
        batches=(itertools.repeat(batch), itertools.repeat(batch)),
    )
    return tree.to(got.hypergradient, "cpu", torch.float64)


def error(spec: Any, dtype: torch.dtype, seed: int = 0) -> float:
    """‖h − h₆₄‖ / ‖h₆₄‖, h₆₄ being what the same method finds in float64."""
    exact = answer(spec, torch.float64, seed)
    return tree.norm(tree.sub(answer(spec, dtype, seed), exact)) / tree.norm(exact)


def cell(spec: Any, dtype: torch.dtype) -> str:
    try:
        return f"{error(spec, dtype):.1e}"
    except BilevelError as refused:
        return type(refused).__name__


if __name__ == "__main__":
    for name in [*registry.names("estimators"), *presets.of("estimators")]:
        print(f"{name:16}", *(f"{cell(name, dtype):>14}" for dtype in NARROW), flush=True)
