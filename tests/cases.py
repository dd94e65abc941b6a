"""Closed-form problems at off-centre points, and the helpers that compare with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel import calculus, tree
from bilevel.functional import hypergradient, solve_lower
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import SGD
from bilevel.problem.estimation import estimate
from bilevel.problem.levels import point_of, structure_of
from bilevel.rng import stream
from bilevel.types import Counts, Estimate, Estimator, Loss, Losses, LowerSolution, Params, Point
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge import Ridge


@dataclass(frozen=True)
class Case:
    """A problem at a random x, with its exact lower solution and hypergradient, in float64."""

    problem: Any
    x: Params
    y: Params
    truth: Params
    upper_batch: Any
    lower_batch: Any

    def losses(self) -> Losses:
        counts = Counts()
        return Losses(
            Loss(self.problem.upper_loss, self.upper_batch, counts, "upper"),
            Loss(self.problem.lower_loss, self.lower_batch, counts, "lower"),
        )

    def estimate(self, estimator: Estimator, y: Params | None = None, **options: Any) -> Estimate:
        return hypergradient(
            self.problem.upper_loss,
            self.problem.lower_loss,
            self.x,
            self.y if y is None else y,
            estimator=estimator,
            upper_batch=self.upper_batch,
            lower_batch=self.lower_batch,
            **options,
        )

    def record(self, steps: int, lr: float, y: Params, **options: Any) -> Any:
        solver = Gradient(steps=steps, optimizer=SGD(lr=lr, **options))
        return solve_lower(
            self.problem.lower_loss, self.x, y, solver=solver, batch=self.lower_batch, record=True
        )

    def hessian(self) -> torch.Tensor:
        from bilevel.linear.dense import matrix

        lower = calculus.linearize(self.losses().lower, Point(self.x, self.y))
        return matrix(lower.hvp_yy, self.y)


PROBLEMS: list[Callable[[int], Any]] = [
    lambda seed: Quadratic(data_seed=seed),
    lambda seed: Quadratic(data_seed=seed, num_upper=3, num_lower=40, condition=1e4),
    lambda seed: Quadratic(data_seed=seed, num_upper=7, num_lower=1),
    lambda seed: Quadratic(data_seed=seed, num_upper=1, num_lower=6, rho=5.0),
    lambda seed: Ridge(data_seed=seed),
    lambda seed: Ridge(data_seed=seed, data="synthetic"),
]
NAMES = ["quadratic", "ill-conditioned", "one lower", "one upper", "diabetes", "badly scaled"]


def closed_form(make: Callable[[int], Any], seed: int) -> Case:
    problem = make(seed)
    generator = stream(seed, "case")
    from bilevel.rng import Streams

    x0, _ = problem.init(Streams(seed))
    x = tree.map(
        lambda p: p + 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64), x0
    )
    return Case(
        problem,
        x,
        problem.lower_solution(x),
        problem.hypergradient(x),
        next(problem.upper_batches(generator)),
        next(problem.lower_batches(generator)),
    )


def relative(a: Params, b: Params) -> float:
    """‖a − b‖ / ‖b‖."""
    return tree.norm(tree.sub(a, b)) / tree.norm(b)


def assert_close(got: Params, expected: Params, rtol: float) -> None:
    error = relative(got, expected)
    assert error <= rtol, f"not close: relative error {error:.3e} > {rtol:.1e}"


def offset(y: Params, size: float, seed: int = 0) -> Params:
    """y moved by a random vector of the given norm."""
    generator = stream(seed, "offset")
    move = tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), y)
    return tree.axpy(size / tree.norm(move), move, y)


def ask_drawing(
    problem: Any, estimator: Estimator, x: Params, y: Params, state: Any, lower: Any, upper: Any
) -> Estimate:
    """One call of an estimator that draws batches: its first of each level, and what more it wants."""
    return hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        y,
        estimator=estimator,
        upper_batch=next(upper),
        lower_batch=next(lower),
        state=state,
        batches=(upper, lower),
    )


def ask_anyway(
    problem: Any, x: Params, y: Params | LowerSolution, estimator: Estimator, **options: Any
) -> Estimate:
    """Its answer at (x, y) of a problem object, whose restrictions of y it may well ignore.

    Not `hypergradient`, which refuses that; a run only warns of it.
    """
    y = y if isinstance(y, LowerSolution) else LowerSolution(y)
    counts, batches = Counts(), (problem.upper_batches, problem.lower_batches)
    F, G = (next(draw(None)) for draw in batches)
    losses = Losses(
        Loss(problem.upper_loss, F, counts, "upper"),
        Loss(problem.lower_loss, G, counts, "lower", structure=structure_of(problem)),
    )
    return estimate(estimator, losses, point_of(x, y), options.pop("state", None))
