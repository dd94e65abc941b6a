"""L-BFGS on the lower level (Liu and Nocedal 1989), by torch.optim with a strong Wolfe search."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import limit
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Pairs, Params


@component
class LBFGS:
    """Full-batch L-BFGS until ‖∇y G‖ ≤ tolerance or `steps` iterations; for smooth deterministic G.

    About 1.25 gradients an iteration. Draws one batch a solve. No path: it cannot be unrolled.
    Gives the last `history` pairs of steps and changes of gradient, for estimators that reuse
    them; they take as much memory again as torch's own.
    """

    steps: PositiveInt = 100
    tolerance: NonNegativeFloat = 1e-8
    relative_tolerance: PositiveFloat | None = None
    """In the place of `tolerance`: that many times the largest ‖∇y G‖ at which a solve began so far."""
    history: PositiveInt = 10

    @property
    def offers(self) -> Offers:
        return Offers(pairs=True)

    def init(self, y: Params) -> dict[str, Any]:
        return {"reference": 0.0}

    def solve(
        self,
        loss: Loss,
        x: Params,
        y: Params,
        *,
        batches: Iterator[Any],
        state: Any,
        record: float = 0,
    ) -> LowerSolution:
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
        points: deque[tuple[Params, Params]] = deque(maxlen=self.history + 1)

        tolerance, reference = self.tolerance, 0.0

        def closure() -> float:
            nonlocal taken, best, tolerance, reference
            with at_start(taken):
                value, g = calculus.gradient_y(loss, x, y)
            norm = tree.norm(g)
            if not math.isfinite(norm):
                require_finite(loss, x, y, g, taken)
            if taken == 0:
                tolerance, reference = limit(tolerance, self.relative_tolerance, state, norm)
            taken += 1
            points.append((tree.clone(y), g))
            if norm < best[1]:
                best = (float(value), norm, points[-1][0])
            if norm <= tolerance:
                raise _Converged
            for name, entry in y.items():
                entry.grad = g[name].contiguous()  # it is viewed as a vector; vmap leaves strides
            return float(value)

        with suppress(_Converged):
            optimizer.step(closure)
        iterations = optimizer.state[next(iter(y.values()))].get("n_iter", 0) if y else 0
        value, norm, y = best
        stats = LowerStats(iterations, taken, value, norm, norm <= tolerance)
        return LowerSolution(y, {"reference": reference}, stats, batch, pairs=_pairs(points))


def _pairs(points: Sequence[tuple[Params, Params]]) -> Pairs:
    """Differences between one evaluation and the next; torch keeps its own out of reach.

    Trial points of the line search are among them: ∂²yy G maps their differences as it does those
    of iterates. Only differences along which G curves up, by more than rounding, are kept.
    """
    pairs = [
        (tree.sub(y, y_before), tree.sub(g, g_before))
        for (y_before, g_before), (y, g) in itertools.pairwise(points)
    ]
    if not pairs:
        return ()
    rough = tree.eps(points[0][1]) ** 0.5
    least = rough * max(tree.norm(change) for _, change in pairs)
    return tuple((s, c) for s, c in pairs if tree.norm(c) > least and _has_positive_curvature(s, c))


def _has_positive_curvature(step: Params, change: Params) -> bool:
    return tree.dot(step, change) > 1e-10 * tree.norm(step) * tree.norm(change)


class _Converged(Exception):
    """Leaves the optimizer's loop at the tolerance on ‖∇y G‖₂, which torch measures otherwise."""
