"""One estimator at one seed, measured in this process.

What to measure is {"kind", "recipe", "folder", "budget", "result"}; a process of kind "scene"
prepares what the cells of its seed are measured on. The result is written all or not at all.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from bilevel import recipe as recipes
from bilevel import tree
from bilevel.comparing import scene
from bilevel.comparing.files import read, write
from bilevel.comparing.memory import peak
from bilevel.comparing.scene import Truth
from bilevel.errors import BilevelError, told
from bilevel.estimators.implicit import Implicit
from bilevel.events import Stepped
from bilevel.functional import hypergradient
from bilevel.problem import estimation
from bilevel.problem.levels import point_of
from bilevel.recipe.assemble import assemble
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.runfolder.folder import environment
from bilevel.testing import scene_at
from bilevel.types import Estimate, LowerSolution, Params, Point
from bilevel.types import Path as Steps

REPETITIONS = 5
"""Timed estimates, after one that is not timed."""


def main(spec: dict[str, Any]) -> None:
    """Do what `spec` says; what goes wrong is written as the result, with its reason."""
    result = Path(spec["result"])
    found: dict[str, Any] = {"status": "ok", "reason": None}
    try:
        if spec["kind"] == "scene":
            found |= scene.make(Path(spec["recipe"]), Path(spec["folder"]))
        else:
            measure(Path(spec["recipe"]), Path(spec["folder"]), spec["budget"], found)
    except Exception as error:
        is_foreseen = isinstance(error, BilevelError)
        found |= {"status": "failed", "reason": str(error) if is_foreseen else told(error)}
        if not is_foreseen:
            traceback.print_exc()
    write(result, found | {"environment": environment()})


def measure(recipe: Path, folder: Path, budget: int | None, found: dict[str, Any]) -> None:
    """Fill `found` stage by stage, so that what was measured before a failure is kept."""
    setup = assemble(recipes.load(recipe))
    for _ in engine.prepare(setup):
        pass
    truths = list(scene.load(folder))
    trained = _Stand(setup, truths[-1])
    found["estimate"] = _cost(trained)
    found["along"] = list(_along(setup, truths))
    found["run"] = _run(setup, budget or read(folder / scene.INDEX)["budget"], truths[-1])


class _Stand:
    """A setup at one point of the run, where the truth is known."""

    def __init__(self, setup: Setup, truth: Truth) -> None:
        self.setup, self.truth = setup, truth
        state = scene.cast(engine.restore(setup, truth.state), setup.dtype)
        self.x, self.state = state.x, state
        self.solved = self._solve(state.y, state.lower_batches)
        self.upper_batch = next(state.upper_batches)
        tight = tree.to(truth.tight, setup.device, setup.dtype)
        path = self._path(tight)
        self.at_solution = Point(self.x, tight, path, pairs=self.solved.pairs)
        self.in_run = point_of(self.x, self.solved)

    def _solve(self, y: Params, batches: Any, *, restart: bool = True) -> LowerSolution:
        """The setup's lower solve from y, recorded as far as the estimator needs."""
        return self.setup.levels.solve(
            self.setup.lower,
            self.x,
            y,
            batches=batches,
            record=self.setup.estimator.needs.path,
            restart=restart,
        )

    def _path(self, tight: Params) -> Steps | None:
        """Steps to follow at the solution: from there on, or the run's where they begin at x."""
        path = self.solved.path
        if path is None or "lower_start" in self.setup.levels:
            return path
        return self._solve(tight, repeat(self.solved.batch), restart=False).path

    def estimate(self, at: Point, state: Any = None) -> Estimate:
        """An estimate without the checks that a first call makes; cold without a state."""
        draws = self.state.upper_batches, self.state.lower_batches
        losses = self.setup.levels.losses(self.upper_batch, self.solved.batch, draws)
        state = self.setup.estimator.init(at) if state is None else state
        return estimation.estimate(self.setup.estimator, losses, at, state)

    def compare(self, estimate: Estimate) -> tuple[float | None, float | None]:
        """(relative error, cosine) against the reference, in float64."""
        if self.truth.reference is None:
            return None, None
        h = tree.to(estimate.hypergradient, "cpu", torch.float64)
        return self.truth.reference.error(h), self.truth.reference.cosine(h)


def _cost(stand: _Stand) -> dict[str, Any]:
    """Oracle calls and memory of the first estimate, seconds of those after it."""
    _warm_up(stand.setup)
    with peak(stand.setup.device) as memory:
        first = stand.estimate(stand.in_run)
    seconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        stand.estimate(stand.in_run)
        if stand.setup.device.type == "cuda":
            torch.cuda.synchronize(stand.setup.device)
        seconds.append(time.perf_counter() - began)
    return {
        **asdict(first.stats),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "memory": memory.bytes,
        "memory_is": memory.how,
    }


def _warm_up(setup: Setup) -> None:
    """A small hypergradient, so that threads and libraries are loaded before memory is read."""
    one = {"p": torch.ones(64, device=setup.device, dtype=setup.dtype)}
    hypergradient(
        lambda x, y, _: (y["p"] * x["p"]).sum(),
        lambda x, y, _: (y["p"] - x["p"]).square().sum() + y["p"].pow(4).sum(),
        one,
        one,
        estimator=Implicit(),
    )


def _along(setup: Setup, truths: Sequence[Truth]) -> Iterator[dict[str, Any]]:
    """Errors at every point: cold, with the state of the point before, and after a lower solve."""
    before = None
    for truth in truths:
        stand = _Stand(setup, truth)
        cold = stand.estimate(stand.at_solution)
        error, cosine = stand.compare(cold)
        in_run, cosine_in_run = stand.compare(stand.estimate(stand.in_run))
        yield {
            "step": truth.step,
            "error": error,
            "cosine": cosine,
            "error_in_run": in_run,
            "cosine_in_run": cosine_in_run,
            **(_warm(stand, before) if before is not None else {}),
        }
        before = cold.state


def _warm(stand: _Stand, before: Any) -> dict[str, Any]:
    """With the state that the estimator left at the point before, and with its own here."""
    warm = stand.estimate(stand.at_solution, before)
    again = stand.estimate(stand.at_solution, warm.state)
    return {
        "error_warm": stand.compare(warm)[0],
        "hvps_warm": warm.stats.hvps,
        "error_again": stand.compare(again)[0],
        "hvps_again": again.stats.hvps,
    }


def _run(setup: Setup, budget: int, trained: Truth) -> dict[str, Any]:
    """The estimator's own run as far as `budget` oracle calls go, and F where it ends.

    A step that would go beyond the budget is not counted: x is the one before it.
    """
    setup = _with_steps(setup, budget)
    state, spent, steps = engine.start(setup), 0, 0
    x = tree.clone(state.x)
    for event in engine.run(setup, state):
        if not isinstance(event, Stepped):
            continue
        if event.totals.calls > budget:
            break
        x, spent, steps = tree.clone(state.x), event.totals.calls, event.step
        if steps == setup.upper.steps:
            break
    value, is_solution = _upper_loss(setup, x, trained)
    where = "y*(x)" if is_solution else "the recipe's lower solve"
    return {"budget": budget, "calls": spent, "steps": steps, "upper_loss": value, "at": where}


def _with_steps(setup: Setup, steps: int) -> Setup:
    upper = replace(setup.upper, steps=max(1, steps))
    return replace(setup, upper=upper, evaluate_every=0, stop=None)


def _upper_loss(setup: Setup, x: Params, trained: Truth) -> tuple[float, bool]:
    """(F(x, y), whether y = y*(x)), on the batches of the trained point, the same for all."""
    state = scene.cast(engine.restore(setup, trained.state), setup.dtype)
    state.x = x
    here = scene_at(setup, state, x, torch.Generator())
    with torch.no_grad():
        return float(here.losses.upper(x, here.tight)), here.stationary
