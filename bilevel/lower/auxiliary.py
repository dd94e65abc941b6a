"""Minimisation problems beside the lower one: penalised, proximal, regularised.

Estimators that take first derivatives alone compare G at two points, and find one of them by a
lower solver of their own, which goes on from where the last call left it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.errors import ProblemError
from bilevel.lower.gradient import Gradient, step
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.lower.solved import solved
from bilevel.types import (
    Function,
    Loss,
    Losses,
    LowerSolver,
    Moved,
    Needs,
    Optimizer,
    Params,
    Point,
    Stats,
)

Auxiliary = dict[str, Any]
"""{"y", "solver", "steps", "converged", "stopped"}: where a solve stands; part of an estimator's state."""


def one_step() -> Gradient:
    """The solver of the methods that take one gradient step of their problem a call."""
    return Gradient(steps=1)


def penalty_needs(
    strength: float, *, moves_lower: bool = True, supports: Iterable[str] = ()
) -> Needs:
    """Of a difference of gradients times `strength`: its rounding is `strength` times theirs."""
    return Needs(
        second_order=False,
        moves_lower=moves_lower,
        supports=frozenset(supports),
        rounding_amplification=strength,
        rounding_remedy="a smaller strength",
    )


def barrier_strength(
    F_xy: tuple[Params, Params], q_xy: tuple[Params, Params], barrier: float, most: float = math.inf
) -> float:
    """λ = max(0, (φ − ⟨∇F, ∇q⟩) / ‖∇q‖²) with φ = min(most, barrier · ‖∇q‖²); 0 where ∇q is 0.

    Of the gradients of F and q in x and y, the smallest λ ≥ 0 with ⟨∇F + λ ∇q, ∇q⟩ ≥ φ.
    """
    square = sum(tree.dot(part, part) for part in q_xy)
    if square == 0:
        return 0.0
    product = sum(tree.dot(f, q) for f, q in zip(F_xy, q_xy, strict=True))
    return max(min(barrier, most / square) - product / square, 0.0)


def begin(solver: LowerSolver, y: Params) -> Auxiliary:
    """An auxiliary solve that starts at y.

    Raises:
        ProblemError: its steps take options from x, which nothing here differentiates.
    """
    if solver.offers.learned:
        raise ProblemError(
            f"an estimator's own lower solver takes {', '.join(sorted(solver.offers.learned))} from x "
            "(a learned option of its optimizer), and only the steps of the run's lower solver are "
            "differentiated; give a number there"
        )
    return {
        "y": tree.clone(y),
        "solver": solver.init(y),
        "steps": 0,
        "converged": None,
        "stopped": None,
    }


def minimise(
    solver: LowerSolver,
    function: Function,
    losses: Losses,
    x: Params,
    at: Auxiliary,
    batches: Iterator[Any],
    parts: int = 1,
) -> Auxiliary:
    """Where `solver` comes from `at` on y ↦ function(x, y, batch).

    A gradient of `function` is counted as `parts` gradients, one of each loss in it, and so is a
    product with its Hessian.
    """
    loss = Loss(function, None, losses.counts, "lower")
    end = solved(solver, loss, x, at["y"], batches=batches, state=at["solver"])
    losses.counts.gradients += (parts - 1) * end.stats.gradients
    losses.counts.hvps += (parts - 1) * end.stats.hvps
    stats = end.stats
    return {
        "y": end.y,
        "solver": end.state,
        "steps": stats.steps,
        "converged": stats.converged,
        "stopped": stats.stopped,
    }


def proximity(a: Params, b: Params, gamma: float) -> Tensor | float:
    """‖a − b‖² / 2 gamma, with its graph; 0 where there is nothing to compare."""
    if not b:
        return 0.0
    squares = {name: (a[name] - entry).square() for name, entry in b.items()}
    return tree.summed(squares) / (2 * gamma)


def move(
    optimizer: Optimizer,
    losses: Losses,
    at: Point,
    along: Params,
    value: float,
    state: Any,
) -> tuple[Moved, Any]:
    """One optimizer step from y along a gradient, and the optimizer's state after it."""
    y, state = step(optimizer, at.y, along, state, losses.lower.structure.project)
    return Moved(y, value, tree.norm(along)), state


def batches_of(loss: Loss) -> Iterator[Any]:
    """The batches that a loss draws; its present one again and again if it draws none."""
    return itertools.repeat(loss.batch) if loss.draws is None else loss.draws


def exact(dim: int) -> LowerSolver:
    """The solver that reaches rounding in `dim` unknowns, for holding a method to its claim."""
    return Newton() if dim <= 200 else LBFGS(steps=2000, tolerance=1e-9)


def convergence_stats(*ends: Auxiliary) -> Stats:
    """Whether the auxiliary problems were solved, None where no solver has a tolerance; and why they ended."""
    known = [end for end in ends if end["converged"] is not None]
    unmet = [end for end in known if not end["converged"]]
    telling = (*unmet, *known, *ends)[0]
    return Stats(converged=telling["converged"], stopped=telling["stopped"])
