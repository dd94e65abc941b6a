"""What differentiating costs the flagship, formulation `weighted`: `python -m tests.benchmarks.weighted`.

Upper steps of the recipe with ten lower steps each, on less data: without an implicit term
(`alternating`), unrolled from the graph that the lower solve keeps, and from its iterates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bilevel import recipe
from bilevel.estimators.alternating import Alternating
from bilevel.estimators.unroll import Unroll
from bilevel.events import Event, Stepped
from bilevel.recipe.assemble import assemble
from bilevel.run import engine
from bilevel.run.engine import Setup
from bilevel.types import Estimator

RECIPE = Path(__file__).parents[2] / "recipes" / "mllm_hft.yaml"
LESS = ["problem.train=200", "problem.warm_up=20", "lower.steps=10", "runtime.device=cpu"]
WAYS: dict[str, Estimator] = {
    "alternating": Alternating(),
    "store": Unroll(),
    "recompute": Unroll(memory="recompute"),
}


def flagship() -> Setup:
    made = assemble(recipe.load(RECIPE, LESS))
    for _ in engine.prepare(made):
        pass
    return made


def stepping(setup: Setup, estimator: Estimator) -> Callable[[], Stepped]:
    """A call that takes the next upper step of a run."""
    made = replace(setup, estimator=estimator)
    events: Iterator[Event] = engine.run(made, engine.start(made))
    return lambda: next(event for event in events if isinstance(event, Stepped))


def times(setup: Setup, repetitions: int = 5) -> dict[str, list[float]]:
    """CPU seconds of an upper step each way, taken in turn; the first is left out."""
    runs = {name: stepping(setup, estimator) for name, estimator in WAYS.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, take in runs.items():
            began = time.process_time()
            take()
            found[name].append(time.process_time() - began)
    return {name: each[1:] for name, each in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    found = times(flagship())
    for name, each in found.items():
        ratios = [one / two for one, two in zip(each, found["alternating"], strict=True)]
        print(f"{name}: {statistics.median(each):.1f} s, {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
