"""L-BFGS on the lower level (Liu and Nocedal 1989), by torch.optim with a strong Wolfe search."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.errors import ProblemError
from bilevel.types import Loss, LowerSolution, LowerStats, Params, component


@component
class LBFGS:
    """Full-batch L-BFGS until ‖∇y G‖ ≤ tolerance or `steps` iterations; for smooth deterministic G.

    About 1.25 gradients an iteration. Draws one batch a solve. No path: it cannot be unrolled.
    Gives the last `history` pairs of steps and changes of gradient, for estimators that reuse
    them; they take as much memory again as torch's own.
    """

    gives_pairs: ClassVar[bool] = True

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
        seen = _Pairs(self.history)

        def closure() -> float:
            nonlocal taken, best
            value, g = calculus.gradient_y(loss, x, y)
            taken, norm = taken + 1, tree.norm(g)
            seen.add(y, g)
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
        return LowerSolution(y, state, stats, batch, pairs=tuple(seen.kept))


class _Pairs:
    """Differences between one evaluation and the next; torch keeps its own out of reach.

    Trial points of the line search are among them: ∂²yy G maps their differences as it does those
    of iterates. Only differences along which G curves up, by more than rounding, are kept.
    """

    def __init__(self, history: int) -> None:
        self.kept: deque[tuple[Params, Params]] = deque(maxlen=history)
        self._last: tuple[Params, Params] | None = None
        self._largest = 0.0

    def add(self, y: Params, g: Params) -> None:
        y, g = tree.clone(y), tree.clone(g)
        if self._last:
            step, change = (tree.sub(new, old) for new, old in zip((y, g), self._last, strict=True))
            size = tree.norm(change)
            self._largest = max(self._largest, size)
            rough = max(torch.finfo(entry.dtype).eps for entry in g.values()) ** 0.5
            bends = tree.dot(step, change) > 1e-10 * tree.norm(step) * size
            if bends and size > rough * self._largest:
                self.kept.append((step, change))
        self._last = y, g


class _Converged(Exception):
    """Leaves the optimizer's loop at the tolerance on ‖∇y G‖₂, which torch measures otherwise."""


def refuse_projection(project: object, name: str) -> None:
    """Raise `ProblemError`: an unconstrained solver would end where the projection moves it."""
    if project is not None:
        raise ProblemError(
            f"lower: {name} cannot keep y in the set that project_lower describes; "
            "use lower: gradient, which projects after each step"
        )
