"""What a run shows of its models, before and after: embeddings in one plane, captions side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.types import Params

from .. import formulations
from .captions_figure import Described, captions_figure
from .evaluation_split import EvaluationSplit
from .evaluator import Evaluator
from .figure import Panel, embedding_figure

DESCRIBED = 8
"""Pictures whose captions are shown."""
TRIPLES = 180
"""Triples in the figure."""


def figures(
    evaluator: Evaluator, evaluation: EvaluationSplit, models: Mapping[str, Params], split: str
) -> dict[str, Any]:
    """Figures by name, of models by title; no embeddings where pictures come without captions, or none
    of them with a hallucinated one.

    `split` is how the footnote names the evaluated split.
    """
    found = {"captions": _captions(evaluator, evaluation, models, split)}
    present = evaluation.captions.present[evaluation.described]
    if present.any():
        panels = [
            Panel.of(title, evaluator.embed(at, evaluation), present, TRIPLES)
            for title, at in models.items()
        ]
        found["embeddings"] = embedding_figure(panels)
    return found


def _captions(
    evaluator: Evaluator, evaluation: EvaluationSplit, models: Mapping[str, Params], split: str
) -> Any:
    """What each model says of the first pictures of the evaluated split."""
    assert evaluation.images is not None
    size = min(DESCRIBED, len(evaluation.scenes))
    said = {
        title: evaluator.describe(formulations.split(at)[0], evaluation, size)[0]
        for title, at in models.items()
    }
    described = [
        Described(
            evaluation.images[i],
            evaluation.scenes[i].names,
            {title: captions[i] for title, captions in said.items()},
        )
        for i in range(size)
    ]
    note = f"The first {size} pictures of the {split} split, in their order."
    return captions_figure(described, evaluation.lexicon, note)
