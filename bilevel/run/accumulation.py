"""Gradient accumulation at the upper level: one step along the mean of several hypergradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from bilevel import tree
from bilevel.types import Estimate, LowerSolution, LowerStats, Stats

Rounds = tuple[LowerSolution, Estimate]


def mean(found: list[Estimate]) -> Estimate:
    """The mean of hypergradients and of F, the state of the last, and the worst of the evidence."""
    total, value = found[0].hypergradient, found[0].value
    for one in found[1:]:
        total, value = tree.add(total, one.hypergradient), value + one.value
    reasons = dict.fromkeys(reason for one in found for reason in one.reasons)
    return replace(
        found[-1],
        hypergradient=tree.scale(1 / len(found), total),
        value=value / len(found),
        stats=_worst([one.stats for one in found]),
        reasons=tuple(reasons),
    )


def _worst(stats: list[Stats]) -> Stats:
    """Counts are summed; of the rest that of the estimate that speaks most against itself."""
    unconverged = [one for one in stats if one.converged is False]
    about = (unconverged or stats)[0]
    bounds = [one.error_bound for one in stats]
    known = [bound for bound in bounds if bound is not None]
    return replace(
        about,
        gradients=sum(one.gradients for one in stats),
        hvps=sum(one.hvps for one in stats),
        cross_products=sum(one.cross_products for one in stats),
        iterations=sum(one.iterations for one in stats),
        seconds=sum(one.seconds for one in stats),
        residual=_most(max, (one.residual for one in stats)),
        damping_residual=_most(max, (one.damping_residual for one in stats)),
        value_error=stats[0].value_error,  # y is solved on the batch of the first
        curvature=_most(min, (one.curvature for one in stats)),
        condition=_most(max, (one.condition for one in stats)),
        degenerate=_most(max, (one.degenerate for one in stats)),
        # ‖mean of errors‖ ≤ mean of their norms, if there is one for each
        error_bound=sum(known) / len(known) if len(known) == len(bounds) else None,
    )


def _most(choose: Callable[[Iterable[Any]], Any], values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def together(solves: list[LowerSolution]) -> LowerSolution:
    """The last lower solve, with what all of them cost and G in the mean."""
    last, stats = solves[-1], [one.stats for one in solves]
    summed = LowerStats(
        sum(one.steps for one in stats),
        sum(one.gradients for one in stats),
        math.fsum(one.loss for one in stats) / len(stats),
        max(one.gradient_norm for one in stats),
        _most(min, (one.converged for one in stats)),
        sum(one.hvps for one in stats),
        _most(max, (one.violation for one in stats)),
        last.stats.stopped,
    )
    return replace(last, stats=summed)
