"""The one call of a lower solver, with the check of what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bilevel import tree
from bilevel.errors import require_kind
from bilevel.types import Loss, LowerSolution, LowerSolver, LowerStats, Params


def solved(
    solver: LowerSolver,
    loss: Loss,
    x: Params,
    y: Params,
    *,
    batches: Iterator[Any],
    state: Any,
    **options: Any,
) -> LowerSolution:
    """Where a solver, which may be somebody's own, comes from y.

    Raises:
        CheckError: it returns no `LowerSolution`, or a y of other names, shapes or dtypes.
    """
    found = solver.solve(loss, x, y, batches=batches, state=state, **options)
    name = f"{type(solver).__name__}.solve"
    require_kind(found, LowerSolution, f"what {name} returns")
    require_kind(found.stats, LowerStats, f"the stats that {name} returns")
    tree.require_like(found.y, y, f"{name} must return y")
    return found
