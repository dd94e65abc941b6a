"""Where an estimator is checked: after the setup's own lower solver, or a substituted one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from bilevel import calculus, rng, tree
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD
from bilevel.run.engine import Setup, start
from bilevel.run.refusals import called, ignored_by, refuse_empty_upper, refuse_mismatch
from bilevel.testing.reference import (
    STATIONARY,
    Reference,
    Scene,
    noise_like,
    reference_at,
    scene_at,
)
from bilevel.types import Estimator, LowerSolver, Point
from bilevel.unrolling.path import projected

ACTIVE = 1e3 * STATIONARY
"""‖∇y G‖ at the lower solution from which on something restricts y there, relative as `STATIONARY`."""


@dataclass(frozen=True)
class CheckScene:
    """The problem near its first x, after the steps of one lower solver, with the truth there."""

    setup: Setup
    perturb: float
    substituted: str | None = None
    """Which lower solver was substituted; None for the setup's own lower solver."""
    lacking: str = ""
    """Why: what the setup's own keeps nothing of."""

    @cached_property
    def scene(self) -> Scene:
        state = start(self.setup)
        refuse_empty_upper(state.x)
        generator = rng.stream(self.setup.seed, "check")
        x = tree.map(lambda p: p + self.perturb * noise_like(p, generator), state.x)
        project = self.setup.levels.get("project_upper")
        x = tree.clone(project(x)) if project else x
        return scene_at(self.setup, state, x, generator)

    @cached_property
    def reference(self) -> Reference | None:
        return reference_at(self.scene)

    @property
    def is_one_of_many(self) -> bool:
        """Whether the batch is a block among others, which are not looked at here."""
        batch = self.scene.losses.lower.batch
        return isinstance(batch, Mapping) and batch.get("blocks", 1) > 1

    @cached_property
    def is_restricted(self) -> bool:
        """Whether the lower solution is not a stationary point of G: something else restricts it there."""
        scene = self.scene
        if not scene.stationary:
            return False
        off = tree.map(lambda p: p + noise_like(p, rng.stream(self.setup.seed, "off")), scene.tight)
        here, there = (
            tree.norm(calculus.gradient_y(scene.losses.lower, scene.x, y)[1])
            for y in (scene.tight, off)
        )
        return here > ACTIVE * (1 + there)


@dataclass
class CheckScenes:
    """The scenes of one setup: after its own lower solver, and after substituted ones."""

    setup: Setup
    perturb: float
    _substituted: dict[str, CheckScene] = field(default_factory=dict)

    @cached_property
    def own(self) -> CheckScene:
        return CheckScene(self.setup, self.perturb)

    def of(self, estimator: Estimator) -> CheckScene:
        """The setup's own, unless its lower solver keeps nothing that the estimator needs.

        Raises:
            ProblemError: the estimator cannot work with the problem, whatever the lower solver.
        """
        needs, lower = estimator.needs, self.setup.lower
        chosen, lacking = None, ""
        if needs.path and not lower.offers.path:
            chosen, lacking = Gradient(optimizer=SGD(lr=0.9 / self._steepest)), "path"
        elif needs.pairs and not lower.offers.pairs:
            chosen, lacking = self._with_pairs, "pairs"
        setup = replace(self.setup, estimator=estimator, lower=chosen or lower)
        refuse_mismatch(setup)
        if chosen is None:
            return self.own
        name = type(chosen).__name__.lower()
        why = f"lower: {called(lower, 'lower')} keeps no {lacking}"
        return self._substituted.setdefault(name, CheckScene(setup, self.perturb, name, why))

    @property
    def _with_pairs(self) -> LowerSolver | None:
        return None if "project_lower" in self.setup.levels else LBFGS()

    @cached_property
    def _steepest(self) -> float:
        """The largest curvature of G at the lower solution, by twenty steps of the power method."""
        scene = self.own.scene
        lower = calculus.linearize(scene.losses.lower, Point(scene.x, scene.tight))
        stream = rng.stream(self.setup.seed, "steepest")
        v, size = tree.map(lambda p: noise_like(p, stream), scene.tight), 1.0
        for _ in range(20):
            v = lower.hvp_yy(tree.scale(1 / tree.norm(v), v))
            size = tree.norm(v)
            if size == 0:
                return 1.0
        return size


def not_applicable(check_scene: CheckScene, estimator: Estimator) -> str | None:
    """Why dΦ/dx is nothing the estimator could return here: what restricts y is unknown to it."""
    name = ignored_by(estimator, check_scene.setup.levels)
    if name is None or estimator.claim != "solution" or not check_scene.is_restricted:
        return None
    if name == "lower_constraints":
        remedy = "kkt"
    else:
        remedy = "fixed_point, or kkt where the problem has lower_constraints"
    return (
        f"{name} restricts the lower solution here, and {called(estimator, 'estimators')} does not support it; "
        f"use estimator: {remedy}"
    )


def moved(scene: Scene, size: float) -> Scene:
    """The scene at a y that is off the solved one: what is flat there has a slope here."""
    stream = rng.stream(scene.setup.seed, "moved")
    y = tree.map(lambda p: p + size * (1 + p.abs()) * noise_like(p, stream), scene.solved.y)
    return replace(scene, solved=replace(scene.solved, y=projected(scene.losses.lower, y)))
