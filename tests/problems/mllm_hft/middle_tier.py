"""The middle tier's recipe on a device, with what it took: SmolLM2, EfficientNet, photographs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bilevel import recipe
from bilevel.events import Evaluated, Stepped
from bilevel.recipe.assemble import assemble
from bilevel.run import engine
from bilevel_problems.mllm_hft.sources.photos import FOLDER, PACKAGE
from tests.problems.mllm_hft.packages import smollm2_lacks

RECIPE = Path(__file__).parents[3] / "recipes" / "mllm_hft_smol.yaml"


@dataclass(frozen=True)
class Measured:
    """Evaluations before and after, and seconds of each part; `peak` bytes on a GPU, else 0."""

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    preparation: float
    run: float
    peak: int
    setup: Any
    state: Any

    def __str__(self) -> str:
        took = f"preparation {self.preparation:.1f} s, {self.steps} steps and both evaluations {self.run:.1f} s"
        return f"{took}, peak {self.peak / 2**20:.0f} MiB"


def lacks() -> str:
    """Why the recipe cannot run here, "" where it can."""
    if not Path(FOLDER).is_dir():
        return f"no photographs: apt-get install {PACKAGE}"
    if find_spec("efficientnet_lite_pytorch") is None:
        return "no package efficientnet-lite-pytorch: pip install 'bilevel[mllm]'"
    return smollm2_lacks()


def measured(device: str, overrides: list[str]) -> Measured:
    """The recipe, prepared and run on `device`."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    made = assemble(recipe.load(RECIPE, [*overrides, f"runtime.device={device}"]))
    start = time.perf_counter()
    list(engine.prepare(made))
    ready = time.perf_counter()
    evaluations, steps = list[dict[str, float]](), 0
    state = engine.start(made)
    for event in engine.run(made, state):
        steps += isinstance(event, Stepped)
        if isinstance(event, Evaluated):
            evaluations.append(dict(event.metrics))
    if cuda:
        torch.cuda.synchronize()
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    before, after = evaluations
    return Measured(before, after, steps, ready - start, end - ready, peak, made, state)
