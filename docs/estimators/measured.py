"""The set-up in which the pages of the estimators measure: the quadratic problem at y*."""

from __future__ import annotations

from bilevel import hypergradient, tree
from bilevel.rng import Streams
from bilevel.types import Estimator, LowerSolution, Pairs, Params, Path
from bilevel_problems.quadratic import Quadratic

problem = Quadratic(condition=10)
x, y = problem.init(Streams(0))
batch, truth = problem.constants, problem.hypergradient(x)


def ask(
    estimator: Estimator,
    y: Params | None = None,
    path: Path | None = None,
    pairs: Pairs | None = None,
) -> tuple[float, int, int, int]:
    """(relative error, gradients, HVPs, cross products), at y* where no y is given."""
    got = hypergradient(
        problem.upper_loss,
        problem.lower_loss,
        x,
        LowerSolution(problem.lower_solution(x) if y is None else y, path=path, pairs=pairs),
        estimator=estimator,
        upper_batch=batch,
        lower_batch=batch,
    )
    off = tree.norm(tree.sub(got.hypergradient, truth)) / tree.norm(truth)
    cost = got.stats
    return off, cost.gradients, cost.hvps, cost.cross_products


def is_about(got: tuple[float, int, int, int], error: float, *cost: int) -> bool:
    """Whether the error is that to 1 %, at exactly that cost."""
    return abs(got[0] - error) < 0.01 * error and got[1:] == cost
