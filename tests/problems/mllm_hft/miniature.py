"""The alignment problem so small that two steps of a run take seconds."""

from __future__ import annotations

from typing import Any

from bilevel.estimators.implicit import Implicit
from bilevel.linear.cg import CG
from bilevel.lower.gradient import Gradient
from bilevel.optimizers.differentiable import Adam
from bilevel.run.engine import Setup
from bilevel.run.upper import Upper
from bilevel_problems.mllm_hft.models.encoders import ViT
from bilevel_problems.mllm_hft.models.tiny import Tiny
from bilevel_problems.mllm_hft.problem import HierarchicalFineTuning
from bilevel_problems.mllm_hft.sources.shapes import Shapes


def miniature(**options: Any) -> HierarchicalFineTuning:
    """A problem of a few dozen pictures, with an encoder and a language model barely trained."""
    chosen: dict[str, Any] = {
        "source": Shapes(),
        "encoder": ViT(width=16, layers=1, heads=2, scenes=16, steps=2, batch=8),
        "model": Tiny(hidden=16, layers=1, heads=2, rank=2, steps=3, batch=4, scenes=16),
        "train": 12,
        "upper": 8,
        "test": 8,
        "questions": 2,
        "warm_up": 2,
        "lower_batch": 4,
        "contrast_batch": 4,
        "upper_batch": 4,
        **options,
    }
    return HierarchicalFineTuning(**chosen)


def prepared(**options: Any) -> HierarchicalFineTuning:
    """A miniature on the CPU in float32, ready for `init`."""
    problem = miniature(**options)
    for _ in problem.prepare():
        pass
    problem.place("cpu", _float())
    return problem


def setup(problem: HierarchicalFineTuning, steps: int = 2) -> Setup:
    """Two upper steps over two lower steps each."""
    return Setup(
        problem=problem,
        lower=Gradient(steps=2, optimizer=Adam(lr=1e-3)),
        upper=Upper(steps=steps, optimizer=Adam(lr=1e-3)),
        estimator=Implicit(solver=CG(iterations=2), damping=5.0),
    )


def _float() -> Any:
    import torch

    return torch.float32
