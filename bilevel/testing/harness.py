"""An estimator beside a problem with a closed form, and the answers it gives there."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import rng, tree
from bilevel.errors import UntrustedWarning
from bilevel.functional import hypergradient
from bilevel.lower.gradient import Gradient
from bilevel.lower.lbfgs import LBFGS
from bilevel.optimizers.differentiable import SGD
from bilevel.rng import Streams
from bilevel.run.engine import Setup, start
from bilevel.run.upper import Upper
from bilevel.testing.reference import Reference, Scene, scene_at
from bilevel.types import Estimate, Estimator, Losses, LowerSolver, Params, Path, Point, tightened


class Harness:
    """An estimator beside a problem, with the lower solves that it needs."""

    def __init__(self, estimator: Estimator, problem: Any, seed: int) -> None:
        self.estimator, self.problem, self.seed = estimator, problem, seed
        steps = Gradient(steps=25, optimizer=SGD(lr=0.2))
        self.lower: LowerSolver = LBFGS() if estimator.needs.pairs else steps
        self.setup = Setup(problem, self.lower, Upper(), estimator, seed=seed, dtype=torch.float64)

    def x(self, number: int = 0) -> Params:
        """The `number`-th x at which it is asked."""
        x, _ = self.problem.init(Streams(self.seed))
        stream = rng.stream(self.seed, f"x {number}")
        noise = tree.map(lambda p: torch.randn(p.shape, generator=stream, dtype=p.dtype), x)
        return tree.axpy(0.1, noise, x)

    def scene(self, number: int = 0) -> Scene:
        """The scene there, in float64."""
        return scene_at(self.setup, start(self.setup), self.x(number), rng.stream(0, "scene"))

    def ask(self, scene: Scene, state: Any, **options: Any) -> Estimate:
        """Its answer at the lower solution; `wrap` is put around both losses.

        Without the warnings that a user is owed: the answer is held against the truth.
        """
        wrap = options.pop("wrap", lambda function: function)
        upper, lower = scene.losses.upper, scene.losses.lower
        estimator = options.pop("estimator", self.estimator)
        batches = itertools.repeat(upper.batch), itertools.repeat(lower.batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustedWarning)
            return hypergradient(
                wrap(upper.function),
                wrap(lower.function),
                scene.x,
                replace(scene.solved, y=options.pop("y", scene.tight)),
                estimator=estimator,
                upper_batch=upper.batch,
                lower_batch=lower.batch,
                state=state,
                batches=batches if estimator.needs.fresh else None,
                structure=self.setup.levels.structure,
            )

    def init(self, scene: Scene) -> Any:
        return init(self.estimator, scene)

    def truth(self, scene: Scene) -> Reference:
        """dΦ/dx in closed form."""
        truth = tree.flatten(self.problem.hypergradient(scene.x))
        return Reference("closed form", truth.double(), 1e-6)

    @property
    def tight(self) -> Estimator:
        return tightened(self.estimator, self.problem.num_lower)


def init(estimator: Estimator, scene: Scene) -> Any:
    """The state before the first call at a scene."""
    solved = scene.solved
    return estimator.init(Point(scene.x, scene.tight, solved.path, pairs=solved.pairs))


def in_float32(scene: Scene) -> Scene:
    """The same scene with every number rounded, the lower steps and what they taught included."""
    solved, losses = scene.solved, scene.losses
    rounded = replace(
        solved, y=_narrow(solved.y), path=_path(solved.path), pairs=_narrow(solved.pairs)
    )
    upper, lower = (loss.on(_narrow(loss.batch)) for loss in (losses.upper, losses.lower))
    return replace(
        scene,
        losses=Losses(upper, lower),
        x=_narrow(scene.x),
        solved=rounded,
        tight=_narrow(scene.tight),
    )


def _narrow(value: Any) -> Any:
    return tree.to(value, "cpu", torch.float32)


def _path(path: Path | None) -> Path | None:
    """Recorded steps with every number rounded; a start that follows x is what it was, then rounded."""
    if path is None:
        return None
    narrow = replace(path, **{f.name: _narrow(getattr(path, f.name)) for f in fields(path)})
    restart = path.restart
    if restart is None:
        return narrow
    return replace(narrow, restart=lambda x: _narrow(restart(tree.map(Tensor.double, x))))
