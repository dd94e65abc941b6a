"""The recorded path of a point, for the estimators that cannot do without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.lower.replay import advance
from bilevel.types import Losses, LowerSolution, Params, Path, Point


def recorded(at: Point, name: str) -> Path:
    """The lower steps that led to a point.

    Raises:
        ProblemError: there are none.
    """
    if at.path is None:
        raise ProblemError(
            f"{name} has no lower steps to follow: pass the `path` of "
            "bilevel.solve_lower(..., record=True)"
        )
    return at.path


def along(path: Path, losses: Losses) -> Callable[[Params], Tensor]:
    """x ↦ F(x, y_K(x)), the steps of the path taken again at every x."""

    def value(x: Params) -> Tensor:
        return losses.upper(x, advance(path, losses.lower, x, len(path.batches)).start)

    return value


def started(solution: LowerSolution, restart: Callable[[Params], Params] | None) -> LowerSolution:
    """The solution with its path known to begin at a function of x, if it holds the first step."""
    path = solution.path
    if path is None or restart is None or len(path.batches) < solution.stats.steps:
        return solution
    return replace(solution, path=replace(path, restart=restart))
