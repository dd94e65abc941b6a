"""Where estimators are checked, and the truth about dΦ/dx there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import calculus, tree
from bilevel.calculus.finite_differences import Differences, central
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.lower.tolerance import curvature_along
from bilevel.problem.levels import Levels, solve
from bilevel.run.engine import Setup, State
from bilevel.testing.closed_form import require_solution
from bilevel.types import ALL_STEPS, Loss, Losses, LowerSolution, Params, Point, Structure

STATIONARY = 1e-9
"""‖∇y G‖ at which the lower level counts as solved, relative to 1 + its size at the start."""
SMALL, SETTLED = 200, 1e-7
"""Up to so many unknowns a Newton step is taken exactly; what it moves of ‖y‖ where y counts as solved."""
SOLVES, RESTS, LOOK_BACK = 1000, 1e-12, 50
"""The setup's own solver is asked up to `SOLVES` times, until y moves by `RESTS` of 1 + its size."""


@dataclass(frozen=True)
class Reference:
    """The truth about dΦ/dx, possibly in some directions only."""

    name: str
    truth: Tensor
    tolerance: float
    """Relative error above which an exact method is wrong."""
    directions: Tensor | None = None
    """[dim, k], orthonormal: where `truth` holds components along these alone."""

    def measure(self, h: Params) -> Tensor:
        """A hypergradient's components where the truth is known."""
        flat = tree.flatten(h).to(self.truth)
        return flat if self.directions is None else self.directions.T @ flat

    def error(self, h: Params) -> float:
        """Relative error; absolute where the truth is zero."""
        size = float(self.truth.norm())
        return float((self.measure(h) - self.truth).norm()) / (size or 1.0)

    def cosine(self, h: Params) -> float | None:
        got = self.measure(h)
        sizes = float(got.norm() * self.truth.norm())
        return float(got @ self.truth) / sizes if sizes else None


@dataclass(frozen=True)
class Scene:
    """A problem at one x: the losses, the lower solve of the recipe, and the tight one.

    Where `stationary` is false no tight solve was reached, and `tight` is as near as it came.
    """

    setup: Setup
    losses: Losses
    x: Params
    solved: LowerSolution
    tight: Params
    stationary: bool
    generator: torch.Generator


def scene_at(setup: Setup, state: State, x: Params, generator: torch.Generator) -> Scene:
    """The scene at x, with the batches that a run in `state` draws next.

    The lower level is solved from the state's y: once as the setup has it, once tightly.

    Raises:
        ProblemError: the problem's `lower_solution` gives no solution.
    """
    levels, record = setup.levels, ALL_STEPS if setup.lower.offers.path else 0
    solved = levels.solve(setup.lower, x, state.y, batches=state.lower_batches, record=record)
    losses = levels.losses(next(state.upper_batches), solved.batch)
    tight, stationary = _resolve(setup, losses.lower, x, solved.y)
    if "lower_solution" in levels:
        require_solution(levels, losses.lower, x, tight, state.y)
    return Scene(setup, losses, x, solved, tight, stationary, generator)


def noise_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _resolve(setup: Setup, lower: Loss, x: Params, y: Params) -> tuple[Params, bool]:
    """(y, whether it is the lower solution): the setup's steps until they rest where G alone will not do."""
    if not _is_restricted(setup.levels) or "lower_solution" in setup.levels:
        return solve_tightly(setup.levels, lower, x, y)
    state, moves = None, list[float]()
    for _ in range(SOLVES):
        before = y
        solved = solve(setup.lower, lower, x, y, itertools.repeat(lower.batch), state)
        y, state = solved.y, solved.state
        moves.append(tree.norm(tree.sub(y, before)) / (1 + tree.norm(y)))
        if moves[-1] <= RESTS:
            return y, True
        diverges = not math.isfinite(moves[-1])
        if diverges or (len(moves) % LOOK_BACK == 0 and not _comes_to_rest(moves)):
            break
    return y, False


def _comes_to_rest(moves: Sequence[float]) -> bool:
    """Whether y, by the rate of the last solves, would rest within four times those that are left."""
    fall = math.log(moves[-LOOK_BACK] / moves[-1]) / LOOK_BACK
    return math.log(moves[-1] / RESTS) <= 4 * fall * (SOLVES - len(moves))


def _is_restricted(levels: Levels) -> bool:
    """Whether y* is more than the minimum of G."""
    return bool(levels.structure.restrictions)


def solve_tightly(levels: Levels, lower: Loss, x: Params, y: Params) -> tuple[Params, bool]:
    """(y, whether ‖∇y G‖ is negligible there): closed form, Newton to 200 unknowns, else L-BFGS."""
    closed = levels.solution(x, y)
    if closed is not None:
        return closed, True
    _, g = calculus.gradient_y(lower, x, y)
    # of the scale of G: what y times its curvature has, or the gradient where that is more
    goal = STATIONARY * (curvature_along(lower, x, y, g) * tree.norm(y) + tree.norm(g))
    small = tree.size(y) <= SMALL
    solver = Newton(tolerance=goal) if small else LBFGS(tolerance=goal, steps=500, history=20)
    free = replace(lower, structure=Structure())  # the minimum of G itself is what is asked
    found = solve(solver, free, x, y, itertools.repeat(lower.batch)).y
    size = max(map(tree.norm, (found, y)))
    found, is_small = _polish(lower, x, found, goal, SETTLED * size if small else math.inf)
    return found, is_small and not _slides(lower, x, found, size)


def _slides(lower: Loss, x: Params, y: Params, size: float) -> bool:
    """Whether a Newton step would still move y by a hundredth of its size.

    exp(−y) has no minimum, and its gradient is as small as one likes once y is large enough.
    """
    at = calculus.linearize(lower, Point(x, y))
    slope = tree.norm(at.gradient)
    bend = tree.norm(at.hvp_yy(at.gradient))
    return slope > 0 and bend > 0 and slope**2 / bend > size / 100


def _polish(lower: Loss, x: Params, y: Params, goal: float, settled: float) -> tuple[Params, bool]:
    """Newton steps while ‖∇y G‖ falls: it can be driven far below what G itself resolves.

    The end is stationary where the gradient is small, whatever the products used, and where `settled`
    says how far a step may still move y: a small gradient says little of y in flat directions.
    """
    exact = settled < math.inf
    solver = Dense() if exact else CG(iterations=500, tolerance=1e-6)
    at, moves = calculus.linearize(lower, Point(x, y)), math.inf
    norm = tree.norm(at.gradient)
    for _ in range(10):
        if norm <= goal and not exact:
            break
        step = solver.solve(at.hvp_yy, at.gradient, tree.zeros_like(y)).solution
        moves = tree.norm(step)
        if norm <= goal and moves <= settled:
            break
        trial = tree.sub(y, step)
        at = calculus.linearize(lower, Point(x, trial))
        if not tree.norm(at.gradient) < norm:
            break
        y, norm = trial, tree.norm(at.gradient)
    return y, norm <= goal and (not exact or moves <= 1e3 * settled)


def reference_at(scene: Scene) -> Reference | None:
    """dΦ/dx at the scene by the tightest means there is; None where there is none."""
    levels, x = scene.setup.levels, scene.x
    closed = levels.get("hypergradient")
    if closed is not None:
        h = closed(x)
        in_order = tree.flatten({name: h[name] for name in x})
        return Reference("closed form", in_order.detach(), 1e-6)
    if scene.stationary:
        found = _differences_of_value(scene)
        if found and found.error <= 1e-2:
            return from_differences("central differences", found)
    if _is_restricted(levels):
        return None  # the adjoint equation does not know the set that restricts y
    return _verified_adjoint(scene)


def from_differences(name: str, found: Differences) -> Reference:
    some = (
        "" if len(found.slopes) == len(found.directions) else f" ({len(found.slopes)} directions)"
    )
    return Reference(name + some, found.slopes, max(1e-5, 10 * found.error), found.directions)


def _differences_of_value(scene: Scene) -> Differences | None:
    """Central differences of Φ, the lower level solved again at every x; None where it could not be."""
    solved: list[bool] = []

    def value(x: Params) -> Tensor:
        y, is_solved = _resolve(scene.setup, scene.losses.lower, x, scene.tight)
        solved.append(is_solved)
        return scene.losses.upper(x, y)

    found = central(value, scene.x, scene.generator, step=1e-3)
    return found if all(solved) else None


def _verified_adjoint(scene: Scene) -> Reference | None:
    """∇x F − (∇x G(y + εv) − ∇x G(y − εv)) / 2ε, v from CG and its equation verified by differences.

    Independent of every second derivative but those in CG, whose result is accepted only if
    first differences of ∇y G along v return ∇y F.
    """
    at, losses = Point(scene.x, scene.tight), scene.losses
    _, F_x, F_y = calculus.gradients(losses.upper, at)
    lower = calculus.linearize(losses.lower, at)
    F_y = lower.restrict(F_y)
    v = CG().tight(min(tree.size(at.y), 50)).solve(lower.hvp_yy, F_y, tree.zeros_like(F_y)).solution
    size = tree.norm(v)
    if size == 0:
        return Reference("no adjoint: ∇y F = 0", tree.flatten(F_x), 1e-5)
    h = 1e-4 / size
    ends = [tree.axpy(s * h, v, at.y) for s in (1, -1)]
    Hv = half_difference(h, *(calculus.gradient_y(losses.lower, at.x, y)[1] for y in ends))
    off = tree.norm(tree.sub(Hv, F_y)) / tree.norm(F_y)
    if not off <= 1e-3:
        return None
    cross = half_difference(h, *(calculus.gradient_x(losses.lower, at.x, y) for y in ends))
    truth = tree.flatten(tree.sub(F_x, cross))
    return Reference("converged adjoint", truth, max(1e-4, 100 * off))


def half_difference(h: float, above: Params, below: Params) -> Params:
    return tree.scale(1 / (2 * h), tree.sub(above, below))
