"""Is a hypergradient right? `check` holds estimators to their claims on any problem.

The reference is the problem's closed form where it has one; else central differences of Φ
through a re-solved lower level; else a converged adjoint whose products are verified by first
differences of ∇G. Everything is in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import calculus, rng, tree
from bilevel.differences import Differences, central
from bilevel.engine import Setup, State, prepare, start
from bilevel.errors import BilevelError, ConvergenceError, ProblemError
from bilevel.events import Event
from bilevel.functional import hypergradient
from bilevel.linear.cg import CG
from bilevel.lower.lbfgs import LBFGS
from bilevel.lower.newton import Newton
from bilevel.lower.recorded import started
from bilevel.problem import restart_of
from bilevel.types import (
    ALL_STEPS,
    Counts,
    Estimate,
    Estimator,
    Loss,
    Losses,
    LowerSolution,
    Params,
    Point,
    Stats,
)

Verdict = Literal["exact", "as claimed", "approximate", "wrong", "untested"]
"""exact: it is dΦ/dx; as claimed: it is the derivative of what it says; approximate: no claim."""

STATIONARY = 1e-9
"""‖∇y G‖ at which the lower level counts as solved, relative to 1 + its size at the start."""


@dataclass(frozen=True)
class CheckRow:
    """What was found about one estimator."""

    name: str
    reference: str
    """What dΦ/dx was compared with."""
    error: float | None
    """‖h − reference‖ / ‖reference‖ as configured, after the configured lower solve."""
    cosine: float | None
    claim: str | None
    claim_error: float | None
    """Relative error against the function it claims to differentiate, where the claim must hold."""
    verdict: Verdict
    note: str
    stats: Stats


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


def check(
    setup: Setup,
    estimators: Mapping[str, Estimator],
    *,
    dtype: torch.dtype = torch.float64,
    perturb: float = 0.1,
) -> Iterator[Event | CheckRow]:
    """Compare each estimator with the truth, and with what it claims, near the initial x.

    x is the initial point plus `perturb` times normal noise, so that symmetric starting points
    hide nothing. Yields the problem's `Progress` while it prepares, then one row an estimator.

    A claim is tested where it must hold: at the tightly solved lower level for "solution", with
    the estimator's `tight` settings; by central differences of its own `objective` else.

    Raises:
        ProblemError: the problem itself cannot be differentiated.
    """
    setup = replace(setup, dtype=dtype)
    yield from prepare(setup)
    scene = _scene(setup, perturb)
    reference = reference_at(scene)
    for name, estimator in estimators.items():
        yield _row(scene, reference, name, estimator)


def _scene(setup: Setup, perturb: float) -> Scene:
    state = start(setup)
    if not state.x:
        raise ProblemError("x is empty: with one level only there is no hypergradient to check")
    generator = rng.stream(setup.seed, "check")
    x = tree.map(lambda p: p + perturb * _noise(p, generator), state.x)
    project = getattr(setup.problem, "project_upper", None)
    x = tree.clone(project(x)) if project else x
    return scene_at(setup, state, x, generator)


def scene_at(setup: Setup, state: State, x: Params, generator: torch.Generator) -> Scene:
    """The scene at x, with the batches that a run in `state` draws next.

    The lower level is solved from the state's y: once as the setup has it, once tightly.
    """
    constrain = getattr(setup.problem, "project_lower", None)
    counts = Counts()
    lower = Loss(setup.problem.lower_loss, None, counts, "lower")
    restart = restart_of(setup.problem, state.y)
    y = tree.detach(restart(x)) if restart else state.y
    solved = setup.lower.solve(
        lower,
        x,
        y,
        batches=state.lower_batches,
        state=setup.lower.init(y),
        record=ALL_STEPS if setup.lower.records else 0,
        project=constrain,
    )
    solved = started(solved, restart)
    lower = lower.on(solved.batch)
    upper = Loss(setup.problem.upper_loss, next(state.upper_batches), counts, "upper")
    tight, stationary = _resolve(setup, lower, x, solved.y)
    return Scene(setup, Losses(upper, lower), x, solved, tight, stationary, generator)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _resolve(setup: Setup, lower: Loss, x: Params, y: Params) -> tuple[Params, bool]:
    """(y, whether it is the lower solution): projected steps until they rest where y is held in a set."""
    project = getattr(setup.problem, "project_lower", None)
    if project is None or hasattr(setup.problem, "lower_solution"):
        return solve_tightly(setup.problem, lower, x, y)
    state = setup.lower.init(y)
    for _ in range(1000):
        before = y
        solved = setup.lower.solve(
            lower, x, y, batches=itertools.repeat(lower.batch), state=state, project=project
        )
        y, state = solved.y, solved.state
        if tree.norm(tree.sub(y, before)) <= 1e-12 * (1 + tree.norm(y)):
            return y, True
    return y, False


def solve_tightly(problem: Any, lower: Loss, x: Params, y: Params) -> tuple[Params, bool]:
    """(y, whether ‖∇y G‖ is negligible there): closed form, Newton to 200 unknowns, else L-BFGS."""
    closed = getattr(problem, "lower_solution", None)
    if closed is not None:
        return tree.detach(closed(x)), True
    _, g = calculus.gradient_y(lower, x, y)
    goal = STATIONARY * (1 + tree.norm(g))
    small = tree.size(y) <= 200
    solver = Newton(tolerance=goal) if small else LBFGS(tolerance=goal, steps=500, history=20)
    y = solver.solve(lower, x, y, batches=itertools.repeat(lower.batch), state={}).y
    return _polish(lower, x, y, goal)


def _polish(lower: Loss, x: Params, y: Params, goal: float) -> tuple[Params, bool]:
    """Newton steps by CG while ‖∇y G‖ falls: it can be driven far below what G itself resolves.

    Whether the end is stationary is decided by the gradient alone, not by the products used.
    """
    at = calculus.linearize(lower, Point(x, y))
    norm = tree.norm(at.gradient)
    for _ in range(10):
        if norm <= goal:
            return y, True
        step = CG(iterations=500, tolerance=1e-6).solve(at.hvp_yy, at.gradient, tree.zeros_like(y))
        trial = tree.sub(y, step.solution)
        at = calculus.linearize(lower, Point(x, trial))
        if not tree.norm(at.gradient) < norm:
            break
        y, norm = trial, tree.norm(at.gradient)
    return y, norm <= goal


def reference_at(scene: Scene) -> Reference | None:
    """dΦ/dx at the scene by the tightest means there is; None where there is none."""
    problem, x = scene.setup.problem, scene.x
    closed = getattr(problem, "hypergradient", None)
    if closed is not None:
        return Reference("closed form", tree.flatten(closed(x)).detach(), 1e-6)
    if scene.stationary:
        found = _differences_of_value(scene)
        if found.error <= 1e-2:
            return _from_differences("central differences", found)
    if hasattr(problem, "project_lower"):
        return None  # the adjoint equation does not know the set that holds y
    return _verified_adjoint(scene)


def _from_differences(name: str, found: Differences) -> Reference:
    some = (
        "" if len(found.slopes) == len(found.directions) else f" ({len(found.slopes)} directions)"
    )
    return Reference(name + some, found.slopes, max(1e-5, 10 * found.error), found.directions)


def _differences_of_value(scene: Scene) -> Differences:
    """Central differences of Φ, the lower level solved again at every x."""

    def value(x: Params) -> Tensor:
        y, _ = _resolve(scene.setup, scene.losses.lower, x, scene.tight)
        return scene.losses.upper(x, y)

    return central(value, scene.x, scene.generator, step=1e-3)


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
    Hv = _half(h, *(calculus.gradient_y(losses.lower, at.x, y)[1] for y in ends))
    off = tree.norm(tree.sub(Hv, F_y)) / tree.norm(F_y)
    if not off <= 1e-3:
        return None
    cross = _half(h, *(calculus.gradient_x(losses.lower, at.x, y) for y in ends))
    truth = tree.flatten(tree.sub(F_x, cross))
    return Reference("converged adjoint", truth, max(1e-4, 100 * off))


def _half(h: float, above: Params, below: Params) -> Params:
    return tree.scale(1 / (2 * h), tree.sub(above, below))


def _row(scene: Scene, reference: Reference | None, name: str, estimator: Estimator) -> CheckRow:
    known = reference.name if reference else "none: the lower level cannot be solved tightly"
    row = CheckRow(name, known, None, None, estimator.claim, None, "untested", "", Stats())
    try:
        row = _as_configured(scene, reference, row, estimator)
        if estimator.claim is None:
            return replace(row, verdict="approximate", note="claims nothing (damped, or truncated)")
        if estimator.claim == "solution":
            return _judge_solution(scene, reference, row, _tight(scene, estimator))
        return _judge_objective(scene, row, _tight(scene, estimator))
    except BilevelError as error:
        return replace(row, note=str(error))
    except Exception as error:  # one estimator's mistake must not cost the others their rows
        return replace(row, verdict="wrong", note=f"raised {type(error).__name__}: {error}")


def _as_configured(
    scene: Scene, reference: Reference | None, row: CheckRow, estimator: Estimator
) -> CheckRow:
    try:
        got = _ask(scene, estimator, scene.solved.y)
    except ConvergenceError as error:  # its claim may hold at other settings
        return replace(row, note=str(error))
    row = replace(row, stats=got.stats)
    if reference is None:
        return row
    h = got.hypergradient
    return replace(row, error=reference.error(h), cosine=reference.cosine(h))


def _tight(scene: Scene, estimator: Estimator) -> Estimator:
    tighten = getattr(estimator, "tight", None)
    return tighten(tree.size(scene.tight)) if tighten else estimator


def _judge_solution(
    scene: Scene, reference: Reference | None, row: CheckRow, tight: Estimator
) -> CheckRow:
    """Against dΦ/dx at the lower solution. A method that says nothing of its solve has converged."""
    if reference is None:
        return row
    got = _ask_gently(scene, tight)
    if got is None:
        note = "diverges, however small its scale, on a lower level that is convex here"
        verdict: Verdict = "wrong" if _bends_up(scene) else "untested"
        return replace(row, verdict=verdict, note=note if verdict == "wrong" else row.note)
    error, stats = reference.error(got.hypergradient), got.stats
    row, tolerance = replace(row, claim_error=error), reference.tolerance
    if stats.converged is False:
        known = stats.condition is not None and stats.residual is not None
        left = 10 * (stats.condition or 0.0) * (stats.residual or 0.0) if known else math.inf
        if left > 1e-2:
            return _unfinished(scene, reference, row, stats)
        tolerance = max(tolerance, left)
    # a converged adjoint shows the formula right at that point, not that the point is the solution
    at_solution = reference.name.startswith(("closed form", "central differences"))
    return _verdict(row, error, tolerance, "exact" if at_solution else "as claimed")


def _judge_objective(scene: Scene, row: CheckRow, tight: Estimator) -> CheckRow:
    """Against central differences of the function that the estimator says it differentiates."""
    objective = getattr(tight, "objective", None)
    if objective is None:
        return replace(row, note=f"claims {row.claim!r} but has no `objective` to differentiate")
    got = _ask(scene, tight, scene.solved.y)
    at = Point(scene.x, scene.solved.y, scene.solved.path)
    found = central(objective(scene.losses, at), scene.x, scene.generator)
    if found.error > 1e-2:
        note = f"its function is too rough for differences (error {found.error:.1e})"
        return replace(row, note=note)
    truth = _from_differences("", found)
    return _verdict(row, truth.error(got.hypergradient), truth.tolerance, "as claimed")


def _verdict(row: CheckRow, error: float, tolerance: float, kept: Verdict) -> CheckRow:
    if error <= tolerance:
        return replace(row, claim_error=error, verdict=kept)
    note = f"claim missed by {error:.1e}, tolerance {tolerance:.1e}"
    return replace(row, claim_error=error, verdict="wrong", note=note)


def _ask_gently(scene: Scene, tight: Estimator) -> Estimate | None:
    """The estimate, with a smaller scale where a series diverges; None if it always does."""
    for factor in (1.0, 1e-2, 1e-4):
        solver = getattr(tight, "solver", None)
        scale = getattr(solver, "scale", None)
        trial: Any = tight
        if factor < 1:
            if scale is None:
                break
            trial = replace(trial, solver=replace(solver, scale=scale * factor))  # pyright: ignore[reportArgumentType]
        try:
            return _ask(scene, trial, scene.tight)
        except ConvergenceError:
            if scale is None:
                raise
    return None


def _unfinished(scene: Scene, reference: Reference, row: CheckRow, stats: Stats) -> CheckRow:
    """An honest "not converged" excuses a slow method, not one that is no better than no solve."""
    residual = "unknown" if stats.residual is None else f"{stats.residual:.1e}"
    note = f"adjoint not converged: residual {residual}"
    _, F_x, _ = calculus.gradients(scene.losses.upper, Point(scene.x, scene.tight))
    useless = (row.claim_error or 0.0) >= 0.999 * reference.error(F_x)
    if useless and reference.error(F_x) > reference.tolerance and _bends_up(scene):
        note = f"{note}; no better than no solve at all, on a lower level that is convex here"
        return replace(row, verdict="wrong", note=note)
    return replace(row, note=note)


def _bends_up(scene: Scene) -> bool:
    """Whether G has positive curvature along ∇y F and along noise, by first differences alone."""
    at, losses = Point(scene.x, scene.tight), scene.losses
    _, _, F_y = calculus.gradients(losses.upper, at)
    for d in (F_y, tree.map(lambda p: _noise(p, scene.generator), at.y)):
        size = tree.norm(d)
        if size == 0:
            continue
        h = 1e-4 / size
        ends = (tree.axpy(s * h, d, at.y) for s in (1, -1))
        Hd = _half(h, *(calculus.gradient_y(losses.lower, at.x, y)[1] for y in ends))
        if not tree.dot(Hd, d) > 0:
            return False
    return True


def _ask(scene: Scene, estimator: Estimator, y: Params) -> Estimate:
    return hypergradient(
        scene.losses.upper.function,
        scene.losses.lower.function,
        scene.x,
        y,
        estimator=estimator,
        upper_batch=scene.losses.upper.batch,
        lower_batch=scene.losses.lower.batch,
        path=scene.solved.path,
        upper_batches=itertools.repeat(scene.losses.upper.batch),
        lower_batches=itertools.repeat(scene.losses.lower.batch),
        project=getattr(scene.setup.problem, "project_lower", None),
        pairs=scene.solved.pairs,
    )
