"""Start a process for each cell, one after the other, and keep what it found.

A process gives its memory back whole, and one that dies takes nothing with it: what is left is a
cell that says so. Cells that are done are not started again; those that failed are. On Linux each is
forked from a server that has imported torch and nothing else of weight: no thread runs in it, no
tensor lives in it, and a peak is read above what the process held (`memory`), so that what is
measured is what a process of its own would show, without the seconds of its start.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.comparing import cell as cells
from bilevel.comparing import processes, scene
from bilevel.comparing.files import REMEDY, read, write
from bilevel.comparing.plan import Cell, Plan
from bilevel.errors import CheckpointError
from bilevel.recipe.recipe import Recipe
from bilevel.runfolder.files import write_text
from bilevel.runfolder.folder import environment

_MATTERS = ("python", "platform", "packages", "threads", "instructions", "gpus")


@dataclass(frozen=True)
class Done:
    """A step of the comparison has ended."""

    what: str
    seed: int
    result: Mapping[str, Any]
    reused: bool
    seconds: float
    """What it took, then or now; 0 where it is not known or nothing was started."""
    cell: Cell | None = None
    """None where the points of a seed were prepared."""


def launch(plan: Plan, folder: Path) -> Iterator[Done]:
    """Prepare the points of every seed, then measure every cell."""
    here = environment()
    for seed, recipe in plan.scenes.items():
        prepared = _step(f"points of seed {seed}", seed, recipe, folder, here, None)
        yield prepared
        for cell in (cell for cell in plan.cells if cell.seed == seed):
            if cell.refused or cell.recipe is None:
                yield _failed(cell, cell.refused or "")
            elif prepared.result["status"] == "ok":
                yield _step(cell.label, seed, cell.recipe, folder, here, cell)
            else:
                yield _failed(cell, f"the recipe's own run: {prepared.result['reason']}")


def _failed(cell: Cell, reason: str) -> Done:
    return Done(cell.label, cell.seed, {"status": "failed", "reason": reason}, False, 0.0, cell)


def _step(
    what: str, seed: int, recipe: Recipe, folder: Path, here: Mapping[str, Any], cell: Cell | None
) -> Done:
    began = time.perf_counter()
    stem = f"points-seed{seed}" if cell is None else cell.stem
    points = folder / "points" / f"seed{seed}"
    result = folder / "cells" / f"{stem}.json"
    kept = _kept(result, here)
    if kept and (cell is not None or (points / scene.INDEX).is_file()):
        return Done(what, seed, kept, True, kept.get("wall") or 0.0, cell)
    written = result.with_suffix(".yaml")
    write_text(written, recipe.dump(), remedy=REMEDY, make_folder=True)
    spec = {
        "kind": "scene" if cell is None else "cell",
        "recipe": str(written),
        "folder": str(points),
        "budget": None if cell is None else cell.budget,
        "result": str(result),
    }
    found = run(spec)
    wall = time.perf_counter() - began
    if result.is_file():  # so that a comparison that goes on knows how long the rest takes
        write(result, found | {"wall": wall})
    return Done(what, seed, found, False, wall, cell)


def _kept(path: Path, here: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that can stand: complete, and found with the same software on the same system."""
    if not path.is_file():
        return None
    try:
        found = read(path)
    except CheckpointError:  # damaged: measured again
        return None
    about = found.get("environment")
    same = isinstance(about, dict) and all(about.get(key) == here.get(key) for key in _MATTERS)
    return found if found.get("status") == "ok" and same else None


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one process; what it wrote to stderr lies beside it."""
    result = Path(spec["result"])
    result.unlink(missing_ok=True)
    said = result.with_suffix(".log")
    process = _context().Process(target=_measure, args=(dict(spec), str(said)))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    code = process.exitcode
    if result.is_file():
        return read(result)
    return {"status": "failed", "reason": processes.death(0 if code is None else code, said)}


@functools.cache
def _context() -> Any:
    return processes.context(cells.__name__)


def _measure(spec: dict[str, Any], said: str) -> None:
    processes.detach(said)
    cells.main(spec)
