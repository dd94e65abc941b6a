"""L-BFGS on the lower level (Liu and Nocedal 1989), by torch.optim with a strong Wolfe search."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bilevel import calculus, tree
from bilevel.components import component
from bilevel.lower.start import at_start, require_finite
from bilevel.lower.tolerance import Stop
from bilevel.types import Loss, LowerSolution, LowerStats, Offers, Pairs, Params, Stopped

SHORT = 1e-4
"""The part of ‖y‖ up to which a step may be one across a kink."""


@component
class LBFGS:
    """Full-batch L-BFGS until ‖∇y G‖ is small enough or `steps` iterations; for smooth deterministic G.

    About 1.25 gradients an iteration, and 1 for the scale of G in the first solve: torch's steps
    and thresholds are absolute, and it is given G over its curvature.
    Draws one batch a solve. No path: it cannot be unrolled.
    Gives the last `history` pairs of steps and changes of gradient, for estimators that reuse
    them; they take as much memory again as torch's own.
    """

    needs_whole: ClassVar[str] = "lower: gradient with optimizer: adam"
    steps: PositiveInt = 100
    tolerance: NonNegativeFloat | None = None
    """An absolute ‖∇y G‖ to stop at, in the place of `relative_tolerance`."""
    relative_tolerance: PositiveFloat = 1e-8
    """‖∇y G‖ relative to curvature times ‖y‖ (`bilevel.lower.tolerance`)."""
    history: PositiveInt = 10

    @property
    def offers(self) -> Offers:
        return Offers(pairs=True)

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
    ) -> LowerSolution:
        batch = next(batches)
        loss, taken = loss.on(batch), 0
        stop = Stop(self.tolerance, self.relative_tolerance, state, y)
        y = tree.leaves(tree.clone(y))
        most = self.steps * 5 // 4 + 5
        optimizer = torch.optim.LBFGS(
            list(y.values()),
            max_iter=self.steps,
            max_eval=most,
            history_size=self.history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        best = (float("inf"), float("inf"), tree.clone(y))
        points: deque[tuple[Params, Params]] = deque(maxlen=self.history + 1)

        scale, spent = 1.0, 0
        curvatures, of_long = (deque[float](maxlen=self.history) for _ in range(2))

        def closure() -> float:
            nonlocal taken, best, scale, spent
            with at_start(taken):
                value, g = calculus.gradient_y(loss, x, y)
            norm, here = tree.norm(g), tree.clone(y)
            if not norm < math.inf:
                require_finite(loss, x, y, g, taken)
            if taken == 0:
                spent = stop.begin(loss, x, here, g)
                scale = stop.curvature or 1.0
                curvatures.append(stop.curvature)
                of_long.append(stop.curvature)
            taken += 1
            points.append((here, g))
            if taken > 1:
                met, is_long = _curvature(points[-2], points[-1])
                curvatures.append(met)
                if is_long:
                    of_long.append(met)
                stop.curvature = min(max(curvatures), max(of_long))
            if norm < best[1]:
                best = (value.item(), norm, here)
            if stop.is_met(norm, here):
                raise _Converged
            for name, entry in y.items():
                # it is viewed as a vector; vmap leaves strides
                entry.grad = (g[name] / scale).contiguous()
            return value.item() / scale

        stopped: Stopped = "tolerance"
        try:
            optimizer.step(closure)
            stopped = "stagnation"  # of the line search, unless the budget was spent
        except _Converged:
            pass
        iterations = optimizer.state[next(iter(y.values()))].get("n_iter", 0) if y else 0
        if stopped == "stagnation" and (iterations >= self.steps or taken >= most):
            stopped = "iterations"
        value, norm, y = best
        converged = stopped == "tolerance"
        stats = LowerStats(iterations, taken + spent, value, norm, converged, stopped=stopped)
        return LowerSolution(y, stop.state(y), stats, batch, pairs=_pairs(points))


def _curvature(before: tuple[Params, Params], after: tuple[Params, Params]) -> tuple[float, bool]:
    """(‖change of gradient‖ / ‖step‖ between two evaluations, whether the step is a long one).

    Steps across a kink get as short as one likes, with a gradient that jumps: that is no curvature.
    """
    step = tree.norm(tree.sub(after[0], before[0]))
    change = tree.norm(tree.sub(after[1], before[1]))
    return change / step if step else 0.0, step > SHORT * tree.norm(before[0])


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
