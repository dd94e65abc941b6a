"""What is measured, as pure functions: of answers, of captions, of embeddings."""

from __future__ import annotations

from .answers import (
    Metrics,
    amber_discriminative,
    auc,
    blind,
    parse_answer,
    pope,
    pope_parsed,
)
from .captioning import (
    Row,
    amber_generative,
    amber_row,
    amber_score,
    chair,
    chair_rows,
    without_object,
)
from .geometry import (
    alignment,
    centroid_distance,
    gap,
    linear_probe,
    preference,
    recall_at_1,
    silhouette,
    similarities,
    uniformity,
)

__all__ = [
    "Metrics",
    "Row",
    "alignment",
    "amber_discriminative",
    "amber_generative",
    "amber_row",
    "amber_score",
    "auc",
    "blind",
    "centroid_distance",
    "chair",
    "chair_rows",
    "gap",
    "linear_probe",
    "parse_answer",
    "pope",
    "pope_parsed",
    "preference",
    "recall_at_1",
    "silhouette",
    "similarities",
    "uniformity",
    "without_object",
]
