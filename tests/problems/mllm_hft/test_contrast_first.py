"""The contrast before the first step is that of the lower level, in whatever micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel import tree
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft import contrast_first as module
from bilevel_problems.mllm_hft import formulations
from bilevel_problems.mllm_hft.batches import contrast_batch
from bilevel_problems.mllm_hft.preference_pairs import preference_batch, with_reference
from tests.problems.mllm_hft.miniature import miniature, prepared

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")


def test_contrast_first_begins_where_the_contrast_has_fallen():
    """Contrast, then task: y begins at what L_C alone made, and the task does not know of it."""
    options = {"formulation": "task_only", "contrast_batch": 6}
    plain, first = prepared(**options), prepared(**options, contrast_first=80)
    network, made = first._prepared.loaded.network, first._prepared.first
    _, y = first.init(Streams(0))
    assert y.keys() == plain.init(Streams(0))[1].keys()
    assert all(torch.equal(y[name], made[name]) for name in y)
    assert all(torch.equal(value, first.init(Streams(1))[1][name]) for name, value in y.items())
    moved = {name for name, value in plain.before().items() if not torch.equal(value, y[name])}
    assert any("lora_B" in name for name in moved)
    assert any("projector" in name for name in moved)
    batch = contrast_batch(first._prepared.train, 6, stream(5, "held out"))
    scalars = first._prepared.constants
    start = {**made, **plain.before()}  # heads as they are drawn: the loss reads them too
    heads = {n: v for n, v in network.named_parameters() if n.startswith(("image_", "text_"))}
    with torch.no_grad():
        before = formulations.contrast(network, {**scalars, **start, **heads}, batch)
        after = formulations.contrast(network, {**scalars, **made}, batch)
    assert after < 0.9 * before


def test_contrast_first_is_made_once(monkeypatch):
    options = {"formulation": "task_only", "contrast_first": 3, "seed": 4}
    made = prepared(**options)._prepared.first
    monkeypatch.setattr("bilevel_problems.mllm_hft.contrast_first.train", None)  # not called again
    again = prepared(**options)._prepared.first
    assert made.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in made.items())
    with pytest.raises(TypeError):
        prepared(**{**options, "contrast_first": 4})  # another setting trains: negative control


CPU = torch.device("cpu")
CASES: list[dict[str, Any]] = [
    {},
    {"negatives": "batch", "queue": 4},
    {"contrast_loss": "chip"},
    {"contrast_loss": "chip_released"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_micro_batches_give_the_same_gradient(options):
    """Two batches of the stage, of 5 pairs, two at a time, away from the start."""
    problem = miniature(formulation="task_only", contrast_first=1, contrast_batch=5, **options)
    for _ in problem.prepare():
        pass
    made, found = problem._prepared, []
    for size in (None, 2):
        noise = stream(1, "noise")
        at = tree.map(
            lambda v, noise=noise: (
                v + 0.1 * torch.randn(v.shape, generator=noise)
            ).requires_grad_(),
            made.first,
        )
        object.__setattr__(problem, "micro_batch", size)
        loss, values = module._loss(problem, made, at), []
        for _ in range(2):
            value = loss()
            values += [
                value.detach(),
                *torch.autograd.grad(value, list(at.values()), allow_unused=True),
            ]
        found.append(values)
    scale = max(float(value.abs().max()) for value in found[0] if value is not None)
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * scale)
    assert float(found[0][0]) != float(found[0][len(found[0]) // 2])  # another batch each time


def test_a_preference_is_what_falls_under_chip():
    """CHiP's loss on a batch of another stream, at its start 3 log 2; heads are no part of it."""
    options = {"formulation": "task_only", "contrast_batch": 6, "contrast_loss": "chip"}
    made = prepared(**options, contrast_first=30)._prepared
    assert made.first
    assert not any("head" in name for name in made.first)
    network = made.loaded.network
    drawn = preference_batch(
        made.pairs, made.train.pictures, made.noise_scale, 6, stream(5, "held out")
    )
    batch = with_reference(network, drawn, CPU, torch.float32)
    with torch.no_grad():
        before, after = (
            float(formulations.preferred(network, {**made.constants, **at}, batch, "chip"))
            for at in ({}, made.first)
        )
    assert before == pytest.approx(3 * torch.tensor(2.0).log().item(), rel=1e-5)
    assert after < before - 0.005


def test_negatives_and_queue_are_those_that_are_asked_for():
    def loss(**options: Any) -> float:
        problem = miniature(formulation="task_only", contrast_first=1, **options)
        for _ in problem.prepare():
            pass
        made = problem._prepared
        start = prepared()._prepared.loaded.network
        own = {n: v.detach() for n, v in start.named_parameters() if n in made.first}
        return float(module._loss(problem, made, own)())

    own, whole, queued = loss(), loss(negatives="batch"), loss(queue=4)
    assert own + 0.05 < whole  # more negatives, a larger loss
    assert own + 0.05 < queued
