"""Batches of the lower level: conversations, captions or both, as the formulation reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .batches import Batch, contrast_batch, joined, task_batch
from .preference_pairs import preference_batch
from .queue import StartStates

if TYPE_CHECKING:
    from .preparation import Prepared
    from .problem import HierarchicalFineTuning


def lower_batches(
    problem: HierarchicalFineTuning,
    prepared: Prepared,
    stream: torch.Generator,
    states: StartStates | None,
) -> Iterator[dict[str, Any]]:
    """ "task" and "contrast" where the form has them, without what a preference's reference says.

    `states` are those of the queue, None where there is none.
    """
    form = problem.form
    while True:
        batch: dict[str, Any] = {}
        if form.task:
            batch["task"] = _conversations(problem, prepared, stream)
        if form.contrast:
            batch["contrast"] = contrast(problem, prepared, stream, states)
        yield batch


def contrast(
    problem: HierarchicalFineTuning,
    prepared: Prepared,
    stream: torch.Generator,
    states: StartStates | None,
) -> dict[str, Any]:
    """What L_C reads, but for a preference's reference."""
    if problem.contrast_loss != "hacl":
        return _preferences(problem, prepared, stream)
    return contrast_batch(
        prepared.train,
        problem.contrast_batch,
        stream,
        problem.negatives,
        problem.queue,
        states,
    )


def _conversations(
    problem: HierarchicalFineTuning, prepared: Prepared, stream: torch.Generator
) -> Batch:
    """Training conversations, and the clean share from the upper data."""
    clean = round(problem.clean * problem.lower_batch)
    shares = ((prepared.train, problem.lower_batch - clean), (prepared.upper, clean))
    return joined([task_batch(data, size, stream) for data, size in shares if size])


def _preferences(
    problem: HierarchicalFineTuning, prepared: Prepared, stream: torch.Generator
) -> dict[str, Any]:
    assert prepared.pairs is not None
    assert prepared.noise_scale is not None
    batch = preference_batch(
        prepared.pairs,
        prepared.train.pictures,
        prepared.noise_scale,
        problem.contrast_batch,
        stream,
    )
    origin = prepared.train.origin
    return batch if origin is None else {**batch, "origin": origin[batch["scene"]]}
