"""L-BFGS on the lower level (Liu and Nocedal 1989), by torch.optim with a strong Wolfe search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.types import Loss, LowerSolution, LowerStats, Params, component


@component
class LBFGS:
    """Full-batch L-BFGS until ‖∇y G‖ ≤ tolerance or `steps` iterations; for smooth deterministic G.

    About 1.25 gradients an iteration. Draws one batch a solve. No path: it cannot be unrolled.
    """

    steps: PositiveInt = 100
    tolerance: NonNegativeFloat = 1e-8
    history: PositiveInt = 10

    @property
    def records(self) -> bool:
        return False

    def init(self, y: Params) -> dict[str, Any]:
        return {}

    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
        project: Callable[[Params], Params] | None = None,
    ) -> LowerSolution:
        refuse_projection(project, "lbfgs")
        batch = next(batches)
        loss, y, taken = loss.on(batch), tree.leaves(tree.clone(y)), 0
        optimizer = torch.optim.LBFGS(
            list(y.values()),
            max_iter=self.steps,
            max_eval=self.steps * 5 // 4 + 5,
            history_size=self.history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        best = (float("inf"), float("inf"), tree.clone(y))

        def closure() -> float:
            nonlocal taken, best
            value, g = calculus.gradient_y(loss, x, y)
            taken, norm = taken + 1, tree.norm(g)
            if norm < best[1]:
                best = (float(value), norm, tree.clone(y))
            if norm <= self.tolerance:
                raise _Converged
            for name, entry in y.items():
                entry.grad = g[name]
            return float(value)

        with suppress(_Converged):
            optimizer.step(closure)
        value, norm, y = best
        stats = LowerStats(taken, taken, value, norm, norm <= self.tolerance)
        return LowerSolution(y, state, stats, batch)


class _Converged(Exception):
    """Leaves the optimizer's loop at the tolerance on ‖∇y G‖₂, which torch measures otherwise."""


def refuse_projection(project: object, name: str) -> None:
    """Raise `ProblemError`: an unconstrained solver would end where the projection moves it."""
    if project is not None:
        raise ProblemError(
            f"lower: {name} cannot keep y in the set that project_lower describes; "
            "use lower: gradient, which projects after each step"
        )
