"""Losses against loops written out, and against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bilevel_problems.mllm_hft.losses import (
    TAU_RANGE,
    contrastive_loss,
    log_kind_weights,
    task_loss,
    temperature,
)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def naive(image, text, hallucinated, present, weights, tau, *, hard: bool = True) -> float:
    """Both directions of InfoNCE by loops over pictures, captions and kinds."""
    total = 0.0
    for i in range(len(image)):
        right = math.exp(cosine(image[i], text[i]) / tau)
        to_image = sum(math.exp(cosine(image[j], text[i]) / tau) for j in range(len(image)))
        to_text = sum(math.exp(cosine(image[i], text[j]) / tau) for j in range(len(image)))
        for k in range(hallucinated.shape[1]):
            if hard and present[i, k]:
                to_text += weights[k] * math.exp(cosine(image[i], hallucinated[i, k]) / tau)
        total -= (math.log(right / to_image) + math.log(right / to_text)) / 2
    return total / len(image)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    image, text = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    hallucinated = torch.randn(5, 3, 7, generator=g, dtype=torch.float64)
    present = torch.rand(5, 3, generator=g) > 0.3
    scores = torch.randn(3, generator=g, dtype=torch.float64)
    return image, text, hallucinated, present, scores


@pytest.mark.parametrize("tau", [0.07, 0.4])
def test_contrastive_loss_is_the_double_loop(batch, tau):
    image, text, hallucinated, present, scores = batch
    log_w = log_kind_weights(scores)
    got = contrastive_loss(image, text, hallucinated, present, log_w, torch.tensor(tau))
    expected = naive(image, text, hallucinated, present, log_w.exp().tolist(), tau)
    assert float(got) == pytest.approx(expected, rel=1e-6)
    without = naive(image, text, hallucinated, present, log_w.exp().tolist(), tau, hard=False)
    assert float(got) != pytest.approx(without, rel=1e-3)


def test_a_weight_of_two_counts_as_two_copies(batch):
    image, text, hallucinated, present, _ = batch
    tau = torch.tensor(0.2, dtype=torch.float64)
    one, there = hallucinated[:, :1], torch.ones_like(present[:, :1])
    zero = torch.zeros(1, dtype=torch.float64)
    heavy = contrastive_loss(image, text, one, there, zero + math.log(2), tau)
    twice = contrastive_loss(
        image, text, one.repeat(1, 2, 1), there.repeat(1, 2), zero.repeat(2), tau
    )
    once = contrastive_loss(image, text, one, there, zero, tau)
    assert float(heavy) == pytest.approx(float(twice), rel=1e-12)
    assert float(heavy) > float(once)


def test_a_kind_that_is_not_there_has_no_gradient(batch):
    image, text, hallucinated, present, scores = batch
    hallucinated = hallucinated.requires_grad_()
    loss = contrastive_loss(
        image, text, hallucinated, present, log_kind_weights(scores), torch.tensor(0.1)
    )
    (gradient,) = torch.autograd.grad(loss, hallucinated)
    assert (gradient[~present] == 0).all()
    assert (gradient[present].abs().sum(-1) > 0).all()


def test_weights_keep_their_total_whatever_the_scores():
    for scores in (torch.zeros(4), torch.tensor([3.0, -2.0, 0.5, 9.0])):
        assert float(log_kind_weights(scores).exp().sum()) == pytest.approx(4.0, rel=1e-6)
    weights = log_kind_weights(torch.tensor([0.0, math.log(3.0)])).exp()
    assert weights.tolist() == pytest.approx([0.5, 1.5])


def test_temperature_stays_in_its_range():
    values = [float(temperature(torch.tensor(x))) for x in (-20.0, math.log(0.07), 3.0)]
    assert values == pytest.approx([TAU_RANGE[0], 0.07, TAU_RANGE[1]])


def test_task_loss_counts_answers_alone():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 5.0
    logits[0, 2, 1] = math.log(3.0)
    ids = torch.tensor([[0, 3, 1]])
    counted = torch.tensor([[True, False, True]])
    expected = (math.log(4) + -math.log(3 / 6)) / 2
    assert float(task_loss(logits, ids, counted)) == pytest.approx(expected, rel=1e-6)
    everything = float(task_loss(logits, ids, torch.ones_like(counted)))
    assert everything != pytest.approx(expected, rel=0.1)


def test_task_loss_weights_tokens():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    each = -logits.log_softmax(-1)
    expected = (each[0, 0, 0] + 2 * each[0, 2, 2] + 0.5 * each[1, 0, 3]) / 3.5
    assert float(task_loss(logits, ids, weights)) == pytest.approx(float(expected), rel=1e-6)
