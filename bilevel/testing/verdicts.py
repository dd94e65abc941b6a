"""`check` holds estimators to their claims, a row each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bilevel import calculus, tree
from bilevel.calculus.finite_differences import Differences, central
from bilevel.errors import BilevelError, CheckError, ConvergenceError, ProblemError, told
from bilevel.events import Event
from bilevel.problem.estimation import estimate
from bilevel.problem.levels import point_of
from bilevel.run.engine import Setup, prepare
from bilevel.testing.check_scenes import CheckScene, CheckScenes, moved, not_applicable
from bilevel.testing.reference import (
    Reference,
    Scene,
    from_differences,
    half_difference,
    noise_like,
)
from bilevel.types import Estimate, Estimator, Params, Point, Stats, tightened

Verdict = Literal["exact", "as claimed", "approximate", "wrong", "refused", "untested"]
"""exact: it is dΦ/dx; as claimed: it is the derivative of what it says; approximate: no claim, but an
error that is known; untested: nothing was measured;
refused: it cannot work on this problem, and the note says what can."""

NO_CLAIM = "claims nothing that could be tested"
NO_INNER_SOLUTION = (
    "its inner solve comes to no end however many steps it has, so its claim cannot be tested: what it "
    "minimises may have no minimum"
)
NO_TRUTH = "no truth to compare with: the lower level cannot be solved tightly here"


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

    @property
    def is_claim_alone(self) -> bool:
        """Whether its claim was tested, and what the setup itself would get was not measured."""
        return self.claim_error is not None and self.error is None


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
    the estimator's `tight` settings; by central differences of its own `objective` else. Where
    the setup's lower solver keeps no path or pairs for an estimator that needs them, one that
    does is substituted, and said so; `error` and `cosine` are then None.

    Raises:
        ProblemError: the problem itself cannot be differentiated.
    """
    setup = replace(setup, dtype=dtype, autocast=None)
    yield from prepare(setup)
    check_scenes = CheckScenes(setup, perturb)
    reference = check_scenes.own.reference
    for name, estimator in estimators.items():
        yield _row(check_scenes, reference, name, estimator)


def _row(
    check_scenes: CheckScenes, reference: Reference | None, name: str, estimator: Estimator
) -> CheckRow:
    known = reference.name if reference else "none: the lower level cannot be solved tightly"
    row = CheckRow(name, known, None, None, estimator.claim, None, "untested", "", Stats())
    row = _judge(check_scenes, row, estimator)
    caution = estimator.needs.caution
    return replace(row, note=_joined(row.note, caution and caution()))


def _judge(check_scenes: CheckScenes, row: CheckRow, estimator: Estimator) -> CheckRow:
    try:
        check_scene = check_scenes.of(estimator)
        row = _judge_on(check_scene, row, estimator)
        return replace(row, note=_joined(row.note, _not_as_configured(check_scene, estimator)))
    except ProblemError as error:
        verdict: Verdict = "untested" if check_scenes.own.is_one_of_many else "refused"
        return replace(row, verdict=verdict, note=str(error))
    except CheckError as error:
        return replace(row, verdict="wrong", note=str(error))
    except BilevelError as error:
        return replace(row, note=str(error))
    except Exception as error:  # one estimator's mistake must not cost the others their rows
        return replace(row, verdict="wrong", note=f"raised {told(error)}")


def _judge_on(check_scene: CheckScene, row: CheckRow, estimator: Estimator) -> CheckRow:
    scene = check_scene.scene
    row = _as_configured(check_scene, row, estimator)
    if estimator.claim is None:
        if row.note:  # as it is set it comes to no number, and there is no other way to judge it
            return replace(row, verdict="untested" if check_scene.is_one_of_many else "refused")
        return _without_claim(check_scene, row)
    if reason := not_applicable(check_scene, estimator):
        return replace(row, verdict="refused", note=reason)
    if estimator.claim == "solution":
        return _judge_solution(
            scene, check_scene.reference, row, tightened(estimator, tree.size(scene.tight))
        )
    return _judge_objective(scene, row, tightened(estimator, tree.size(scene.tight)))


def _without_claim(check_scene: CheckScene, row: CheckRow) -> CheckRow:
    """Its error as configured is all there is to say of it, where that is known."""
    if row.error is not None:
        return replace(row, verdict="approximate", note=f"{NO_CLAIM}: err vs dΦ/dx is all there is")
    why = None if check_scene.substituted else NO_TRUTH
    return replace(row, verdict="untested", note=_joined(NO_CLAIM, why))


def _not_as_configured(check_scene: CheckScene, estimator: Estimator) -> str | None:
    """What was done instead where the setup's own lower solver has nothing for an estimator."""
    if check_scene.substituted is None:
        return None
    tested = f"its claim was tested after lower: {check_scene.substituted}"
    said = f"not measured as configured, for {check_scene.lacking}"
    return _joined(said, tested if estimator.claim else None)


def _joined(*notes: str | None) -> str:
    return "; ".join(filter(None, notes))


def _as_configured(check_scene: CheckScene, row: CheckRow, estimator: Estimator) -> CheckRow:
    scene = check_scene.scene
    try:
        got = _ask(scene, estimator, scene.solved.y)
    except ConvergenceError as error:  # its claim may hold at other settings
        return replace(row, note=str(error))
    row = replace(row, stats=got.stats)
    reference = None if check_scene.substituted else check_scene.reference
    if reference is None:
        return row
    h = got.hypergradient
    return replace(row, error=reference.error(h), cosine=reference.cosine(h))


def _judge_solution(
    scene: Scene, reference: Reference | None, row: CheckRow, tight: Estimator
) -> CheckRow:
    """Against dΦ/dx at the lower solution. A method that says nothing of its solve has converged."""
    if reference is None:
        return replace(row, note=_joined(row.note, NO_TRUTH))
    got = _ask_gently(scene, tight)
    if got is None:
        note = "diverges, however small its scale, on a lower level that is convex here"
        verdict: Verdict = "wrong" if _has_positive_curvature(scene) else "untested"
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
    """Against central differences of the function that the estimator says it differentiates.

    Where they tell nothing at the solved y, as those of a gap that is zero there, at a y beside it.
    """
    objective = getattr(tight, "objective", None)
    if objective is None:
        return replace(row, note=f"claims {row.claim!r} but has no `objective` to differentiate")
    found = _differences(scene, objective)
    is_flat = found.error > 1e-2 or not found.slopes.any()
    if is_flat and not (tight.needs.path and row.claim == "path"):
        beside = moved(scene, 0.1)
        again = _differences(beside, objective)
        if again.error <= 1e-2 and (again.slopes.any() or found.error > 1e-2):
            scene, found = beside, again
    if found.error > 1e-2:
        note = f"its function is too rough for differences (error {found.error:.1e})"
        return replace(row, note=note)
    got, truth = _ask(scene, tight, scene.solved.y), from_differences("", found)
    error = truth.error(got.hypergradient)
    if error > truth.tolerance and got.stats.converged is False:
        return replace(row, note=_joined(row.note, NO_INNER_SOLUTION))
    return _verdict(row, error, truth.tolerance, "as claimed")


def _differences(scene: Scene, objective: Any) -> Differences:
    function, found = objective(scene.losses, point_of(scene.x, scene.solved)), None
    for step in (1e-4, 1e-3):  # the latter where an inner solve leaves noise
        trial = central(function, scene.x, scene.generator, step=step)
        if found is None or trial.error < found.error:
            found = trial
        if found.error <= 1e-2:
            break
    assert found is not None
    return found


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
    if useless and reference.error(F_x) > reference.tolerance and _has_positive_curvature(scene):
        note = f"{note}; no better than no solve at all, on a lower level that is convex here"
        return replace(row, verdict="wrong", note=note)
    return replace(row, note=note)


def _has_positive_curvature(scene: Scene) -> bool:
    """Whether G has positive curvature along ∇y F and along noise, by first differences alone."""
    at, losses = Point(scene.x, scene.tight), scene.losses
    _, _, F_y = calculus.gradients(losses.upper, at)
    for d in (F_y, tree.map(lambda p: noise_like(p, scene.generator), at.y)):
        size = tree.norm(d)
        if size == 0:
            continue
        h = 1e-4 / size
        ends = (tree.axpy(s * h, d, at.y) for s in (1, -1))
        Hd = half_difference(h, *(calculus.gradient_y(losses.lower, at.x, y)[1] for y in ends))
        if not tree.dot(Hd, d) > 0:
            return False
    return True


def _ask(scene: Scene, estimator: Estimator, y: Params) -> Estimate:
    upper, lower = scene.losses.upper.batch, scene.losses.lower.batch
    draws = itertools.repeat(upper), itertools.repeat(lower)
    losses = scene.setup.levels.losses(upper, lower, draws)
    return estimate(estimator, losses, point_of(scene.x, replace(scene.solved, y=y)), None)
