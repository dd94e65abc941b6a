"""Where estimators are compared: points along the recipe's own run, and the truth at each.

The run is the recipe's, in its dtype, with its own estimator; the truth is found in float64 by
`bilevel.testing.reference_at`, from the same batches. Both are kept on disk for the cells.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bilevel import recipe as recipes
from bilevel import rng, tree
from bilevel.comparing.files import read, write
from bilevel.errors import ConvergenceError
from bilevel.events import Stepped
from bilevel.recipe.assemble import assemble
from bilevel.run import engine
from bilevel.run.engine import Setup, State
from bilevel.run.refusals import refuse_empty_upper
from bilevel.runfolder import checkpoint
from bilevel.testing import Reference, reference_at, scene_at
from bilevel.types import Params

INDEX = "scene.json"
POINTS = 3
"""Points along the run: its start, its middle and its end, the trained point."""


@dataclass(frozen=True)
class Truth:
    """What is known at one point of the run."""

    step: int
    state: dict[str, Any]
    """The run's state there, as `State.save` has it."""
    tight: Params
    """y*(x), or where the lower level's tight solve ended."""
    stationary: bool
    reference: Reference | None


def make(recipe: Path, folder: Path) -> dict[str, Any]:
    """Run the recipe, find the truth along its run, and keep both below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    setup = assemble(recipes.load(recipe))
    budget = 0
    for step, state in _train(setup):
        checkpoint.save(folder / "states", state.save(), step=step, keep=POINTS)
        budget = state.totals.calls
    precise = replace(assemble(recipes.load(recipe)), dtype=torch.float64, autocast=None)
    _exhaust(precise)
    found = []
    for path in sorted((folder / "states").iterdir()):
        found.append(_find(precise, checkpoint.load(path), folder / "truths"))
    about = {"status": "ok", "budget": budget, "steps": setup.upper.steps, "points": found}
    write(folder / INDEX, about)
    return about


def load(folder: Path) -> Iterator[Truth]:
    """The points in a folder that `make` filled."""
    for point in read(folder / INDEX)["points"]:
        name = f"step-{point['step']:08d}"
        state = checkpoint.load(folder / "states" / name)
        kept = checkpoint.load(folder / "truths" / name)
        reference = Reference(**kept["reference"]) if kept["reference"] else None
        yield Truth(point["step"], state, kept["tight"], kept["stationary"], reference)


def _train(setup: Setup) -> Iterator[tuple[int, State]]:
    _exhaust(setup)
    state, steps = engine.start(setup), setup.upper.steps
    refuse_empty_upper(state.x)
    wanted = {round(steps * k / (POINTS - 1)) for k in range(POINTS)}
    yield 0, state
    for event in engine.run(replace(setup, evaluate_every=0, stop=None), state):
        if isinstance(event, Stepped) and event.step in wanted:
            yield event.step, state
        if isinstance(event, Stepped) and event.step == steps:
            return


def _find(setup: Setup, saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    state = cast(engine.restore(setup, saved), setup.dtype)
    here = scene_at(setup, state, state.x, rng.stream(setup.seed, "compare"))
    found = reference_at(here)
    reference = None
    if found is not None:
        if not torch.isfinite(found.truth).all():
            raise ConvergenceError(f"step {state.step}: the reference, {found.name}, is not finite")
        reference = {
            "name": found.name,
            "truth": found.truth,
            "tolerance": found.tolerance,
            "directions": found.directions,
        }
    kept = {"tight": here.tight, "stationary": here.stationary, "reference": reference}
    checkpoint.save(folder, kept, step=state.step, keep=POINTS)
    return {
        "step": state.step,
        "reference": found.name if found else None,
        "tolerance": found.tolerance if found else None,
        "size": float(found.truth.norm()) if found else None,
        "stationary": here.stationary,
    }


def cast(state: State, dtype: torch.dtype) -> State:
    """A state whose x and y have another dtype; the lower solver starts again."""
    state.x, state.y = (tree.map(lambda p: p.to(dtype), side) for side in (state.x, state.y))
    return state


def _exhaust(setup: Setup) -> None:
    for _ in engine.prepare(setup):
        pass
