"""Losses against loops written out, and against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from bilevel.errors import ProblemError
from bilevel_problems.mllm_hft.losses import (
    TAU_RANGE,
    Negatives,
    Queue,
    contrastive_loss,
    log_weights_of,
    negatives,
    row_weights,
    task_loss,
    temperature,
)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def naive(image, text, hallucinated, against: Negatives, weights, tau, *, hard=True) -> float:
    """Both directions of InfoNCE by loops over pictures, captions and kinds."""
    total, size = 0.0, len(image)
    for i in range(size):
        right = math.exp(cosine(image[i], text[i]) / tau)
        to_image = to_text = right
        for j in range(size):
            if against.pairs[i, j]:
                to_image += math.exp(cosine(image[j], text[i]) / tau)
                to_text += math.exp(cosine(image[i], text[j]) / tau)
            if against.hallucinated.ndim == 3:
                own = against.hallucinated[i, j]
            else:
                own = against.hallucinated[i] & (i == j)
            for k in range(hallucinated.shape[1]):
                if hard and own[k]:
                    to_text += weights[k] * math.exp(cosine(image[i], hallucinated[j, k]) / tau)
        total -= (math.log(right / to_image) + math.log(right / to_text)) / 2
    return total / size


def apart(present: Tensor) -> Negatives:
    """Different pictures with different captions, each against its own hallucinated ones."""
    return Negatives(~torch.eye(len(present), dtype=torch.bool), present)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    image, text = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    hallucinated = torch.randn(5, 3, 7, generator=g, dtype=torch.float64)
    present = torch.rand(5, 3, generator=g) > 0.3
    scores = torch.randn(3, generator=g, dtype=torch.float64)
    return image, text, hallucinated, present, scores


PICTURE = torch.tensor([0, 1, 2, 0, 4])  # pictures 0 and 3 are one
LINE = torch.tensor(
    [
        [0, 1, 2, 3],
        [4, 5, 0, 6],  # the second lie about picture 1 is true of picture 0
        [7, 8, 9, 7],  # a lie that reads as the truth
        [0, 1, 2, 3],
        [4, 10, 11, 12],  # what is true of picture 1 is true of picture 4
    ]
)


@pytest.mark.parametrize("tau", [0.07, 0.4])
@pytest.mark.parametrize("choice", ["own", "batch"])
def test_contrastive_loss_is_the_double_loop(batch, tau, choice):
    image, text, hallucinated, present, scores = batch
    log_w = log_weights_of(scores)
    for against in (apart(present), negatives(PICTURE, LINE, present, choice)):
        got = contrastive_loss(image, text, hallucinated, against, log_w, torch.tensor(tau))
        expected = naive(image, text, hallucinated, against, log_w.exp().tolist(), tau)
        assert float(got) == pytest.approx(expected, rel=1e-6)
        without = naive(image, text, hallucinated, against, log_w.exp().tolist(), tau, hard=False)
        assert float(got) != pytest.approx(without, rel=1e-3)


def test_what_is_true_of_a_picture_is_not_its_negative():
    every = torch.ones(5, 3, dtype=torch.bool)
    pairs = negatives(PICTURE, LINE, every, "own").pairs
    false = {(0, 3), (3, 0), (1, 4), (4, 1), *((i, i) for i in range(5))}
    assert {(i, j) for i in range(5) for j in range(5) if not pairs[i, j]} == false
    own = negatives(PICTURE, LINE, every, "own").hallucinated
    assert [tuple(place) for place in (~own).nonzero().tolist()] == [(2, 2)]
    whole = negatives(PICTURE, LINE, every, "batch").hallucinated
    missing = {tuple(place) for place in (~whole).nonzero().tolist()}
    again = {(i, j, k) for i, j in ((0, 3), (3, 0)) for k in range(3)}
    assert missing == again | {(2, 2, 2), (0, 1, 1), (3, 1, 1)}


def test_a_kind_that_the_scene_has_not_is_no_negative():
    present = torch.tensor([[True, False, True]] * 5)
    for choice in ("own", "batch"):
        found = negatives(PICTURE, LINE, present, choice).hallucinated
        assert not found[..., 1].any()
        assert found[..., 0].any()


def test_contrast_by_hand():
    """Unit vectors at right angles, τ = 1 / log 2, so that exp(cos / τ) is 2, 1 or ½.

    v_0 = t_0 = e_0; v_1 = e_1 and t_1 = −e_0; h_0 = e_1, h_1 = e_0, each of weight 1.
    text → image: row 0: 2 of 2 + 1; row 1: s(v_1,t_1) = 0: 1 of 1 + ½.
    image → text, own: row 0: 2 of 2 + ½ + 1; row 1: 1 of 1 + 1 + 1.
    image → text, batch: row 0 gains s(e_0,e_0): 2 of 5½; row 1 gains s(e_1,e_1): 1 of 5.
    """
    e = torch.eye(2, dtype=torch.float64)
    image, text = e, torch.stack([e[0], -e[0]])
    lies, weights = e.flip(0)[:, None], torch.zeros(1, dtype=torch.float64)
    tau = torch.tensor(1 / math.log(2), dtype=torch.float64)
    picture, line = torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 3]])
    there = torch.ones(2, 1, dtype=torch.bool)

    def loss(choice, line=line):
        against = negatives(picture, line, there, choice)
        return float(contrastive_loss(image, text, lies, against, weights, tau))

    to_image = math.log(3 / 2) + math.log(1.5)
    own = (to_image + math.log(3.5 / 2) + math.log(3)) / 4
    assert loss("own") == pytest.approx(own, rel=1e-12)
    whole = (to_image + math.log(5.5 / 2) + math.log(5)) / 4
    assert loss("batch") == pytest.approx(whole, rel=1e-12)
    # h_1 reads as t_0: row 0 loses its column e_0, row 1 keeps it.
    told = (to_image + math.log(3.5 / 2) + math.log(5)) / 4
    assert loss("batch", torch.tensor([[0, 1], [2, 0]])) == pytest.approx(told, rel=1e-12)


@pytest.mark.parametrize("choice", ["own", "batch"])
def test_a_picture_drawn_twice_is_not_its_own_negative(batch, choice):
    """Every row of [a, a] is that of [a] alone; unmasked, a term is at least log 2."""
    image, text, lies, _, scores = batch
    log_w, tau = log_weights_of(scores), torch.tensor(0.05, dtype=torch.float64)
    there = torch.ones(2, 3, dtype=torch.bool)

    def loss(index, against=None):
        found = negatives(PICTURE[index], LINE[index], there[: len(index)], choice)
        lines = image[index] + 0.01 * text[index]  # captions close to their pictures
        return float(
            contrastive_loss(image[index], lines, lies[index], against or found, log_w, tau)
        )

    once, twice = loss(torch.tensor([0])), loss(torch.tensor([0, 0]))
    assert twice == pytest.approx(once, rel=1e-12)
    planted = loss(torch.tensor([0, 0]), Negatives(~torch.eye(2, dtype=torch.bool), there))
    assert once < 0.1
    assert planted > math.log(2)


def test_a_queue_of_the_other_pictures_is_the_larger_batch(batch):
    """Rows 0 and 1 of five pictures, the other three in the queue; and by hand, what is masked."""
    image, text, hallucinated, present, scores = batch
    log_w, tau = log_weights_of(scores), torch.tensor(0.2, dtype=torch.float64)
    pair = ~torch.eye(5, dtype=torch.bool)

    def loss(counted: torch.Tensor) -> float:
        against = Negatives(pair[:2, :2], present[:2], counted)
        queue = Queue(2.5 * image[2:], 0.3 * text[2:])  # lengths do not matter
        return float(
            contrastive_loss(
                image[:2], text[:2], hallucinated[:2], against, log_w, tau, queue=queue
            )
        )

    def rows(counted: torch.Tensor) -> float:
        total = 0.0
        for i in range(2):
            right = math.exp(cosine(image[i], text[i]) / 0.2)
            to_image = to_text = right
            seen = [1 - i, *(2 + j for j in range(3) if counted[i, j])]
            to_image += sum(math.exp(cosine(image[j], text[i]) / 0.2) for j in seen)
            to_text += sum(math.exp(cosine(image[i], text[j]) / 0.2) for j in seen)
            for k in range(3):
                if present[i, k]:
                    weight = float(log_w[k].exp())
                    to_text += weight * math.exp(cosine(image[i], hallucinated[i, k]) / 0.2)
            total -= (math.log(right / to_image) + math.log(right / to_text)) / 4
        return total

    every = torch.ones(2, 3, dtype=torch.bool)
    some = torch.tensor([[True, False, True], [False, False, True]])
    assert loss(every) == pytest.approx(rows(every), rel=1e-12)
    assert loss(some) == pytest.approx(rows(some), rel=1e-12)
    assert rows(every) > rows(some) + 1e-3
    # One picture, no hallucinated caption: the queue alone is enough to contrast with.
    none = torch.zeros(1, 3, dtype=torch.bool)
    alone = Negatives(none[:, :1], none, every[:1])
    queue = Queue(image[2:], text[2:])
    at = image[:1], text[:1], hallucinated[:1]
    assert float(contrastive_loss(*at, alone, log_w, tau, queue=queue)) > 0


@pytest.mark.parametrize("choice", ["own", "batch"])
def test_first_and_second_derivatives_of_the_contrast(batch, choice):
    image, text, hallucinated, present, scores = batch
    against = negatives(PICTURE, LINE, present, choice)

    def loss(image, text, hallucinated, scores, log_tau):
        return contrastive_loss(
            image, text, hallucinated, against, log_weights_of(scores), temperature(log_tau)
        )

    log_tau = torch.tensor(math.log(0.3), dtype=torch.float64)
    at = tuple(t.clone().requires_grad_() for t in (image, text, hallucinated, scores, log_tau))
    assert gradcheck(loss, at)
    assert gradgradcheck(loss, at)


def test_nothing_to_contrast_with_is_an_error(batch):
    image, text, hallucinated, _, scores = batch
    log_w, tau = log_weights_of(scores), torch.tensor(0.1)
    none = torch.zeros(5, 3, dtype=torch.bool)
    one = negatives(torch.zeros(5, dtype=torch.long), LINE, none, "batch")
    with pytest.raises(ProblemError, match=r"5 pairs has no negative.*problem\.contrast_batch"):
        contrastive_loss(image, text, hallucinated, one, log_w, tau)
    with pytest.raises(ProblemError, match="1 pairs has no negative"):
        contrastive_loss(image[:1], text[:1], hallucinated[:1], apart(none[:1]), log_w, tau)
    some = apart(~none[:1])
    assert float(contrastive_loss(image[:1], text[:1], hallucinated[:1], some, log_w, tau)) > 0


def test_a_weight_of_two_counts_as_two_copies(batch):
    image, text, hallucinated, present, _ = batch
    tau = torch.tensor(0.2, dtype=torch.float64)
    one, there = hallucinated[:, :1], torch.ones_like(present[:, :1])
    zero = torch.zeros(1, dtype=torch.float64)
    heavy = contrastive_loss(image, text, one, apart(there), zero + math.log(2), tau)
    twice = contrastive_loss(
        image, text, one.repeat(1, 2, 1), apart(there.repeat(1, 2)), zero.repeat(2), tau
    )
    once = contrastive_loss(image, text, one, apart(there), zero, tau)
    assert float(heavy) == pytest.approx(float(twice), rel=1e-12)
    assert float(heavy) > float(once)


def test_a_kind_that_is_not_there_has_no_gradient(batch):
    image, text, hallucinated, present, scores = batch
    hallucinated = hallucinated.requires_grad_()
    loss = contrastive_loss(
        image, text, hallucinated, apart(present), log_weights_of(scores), torch.tensor(0.1)
    )
    (gradient,) = torch.autograd.grad(loss, hallucinated)
    assert (gradient[~present] == 0).all()
    assert (gradient[present].abs().sum(-1) > 0).all()


def test_weights_keep_their_total_whatever_the_scores():
    for scores in (torch.zeros(4), torch.tensor([3.0, -2.0, 0.5, 9.0])):
        assert float(log_weights_of(scores).exp().sum()) == pytest.approx(4.0, rel=1e-6)
    weights = log_weights_of(torch.tensor([0.0, math.log(3.0)])).exp()
    assert weights.tolist() == pytest.approx([0.5, 1.5])


def test_without_kinds_there_are_no_weights_and_the_contrast_is_of_pairs(batch):
    """A source that names no kind: the negatives are the other pairs, as with kinds that no scene has."""
    image, text, hallucinated, present, _ = batch
    scores = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    none, tau = log_weights_of(scores), torch.tensor(0.2, dtype=torch.float64)
    assert none.shape == (0,)
    got = contrastive_loss(image, text, hallucinated[:, :0], apart(present[:, :0]), none, tau)
    absent = apart(torch.zeros_like(present))
    like = contrastive_loss(image, text, hallucinated, absent, torch.zeros(3).double(), tau)
    assert float(got.detach()) == pytest.approx(float(like), rel=1e-12)
    (gradient,) = torch.autograd.grad(got, scores)
    assert gradient.shape == (0,)


def test_rows_are_weighed_by_their_source_and_not_renormalised(batch):
    scores = torch.tensor([0.0, math.log(3.0)])  # weights 0.5 and 1.5
    weights = row_weights(scores, torch.tensor([0, 1, 1, 0, -1]))
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.5, 0.5, 1.0])
    image, text, hallucinated, present, kinds = batch
    given = image, text, hallucinated, apart(present), log_weights_of(kinds), torch.tensor(0.2)
    alone = [
        float(contrastive_loss(*given, weights=torch.eye(5, dtype=torch.float64)[i]))
        for i in range(5)
    ]
    assert sum(alone) == pytest.approx(float(contrastive_loss(*given)), rel=1e-12)
    told = float(contrastive_loss(*given, weights=weights.double()))
    assert told == pytest.approx(
        sum(v * one for v, one in zip(weights.tolist(), alone, strict=True))
    )

    logits = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
    ids, counted = torch.ones(5, 3, dtype=torch.long), torch.rand(5, 3) > 0.2
    each = -logits.log_softmax(-1)[..., 1]
    by_hand = sum(
        float(weights[i] * each[i, j]) for i in range(5) for j in range(3) if counted[i, j]
    )
    got = float(task_loss(logits, ids, counted, weights))
    assert got == pytest.approx(by_hand / int(counted.sum()), rel=1e-5)
    assert got != pytest.approx(float(task_loss(logits, ids, counted)), rel=1e-3)


def test_first_and_second_derivatives_in_the_weights_of_sources(batch):
    image, text, hallucinated, present, kinds = batch
    origin, tau = torch.tensor([0, 1, 1, 0, -1]), torch.tensor(0.2, dtype=torch.float64)

    def loss(scores, image):
        weights = row_weights(scores, origin)
        given = image, text, hallucinated, apart(present), log_weights_of(kinds), tau
        return contrastive_loss(*given, weights=weights)

    scores = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    inputs = scores, image.clone().requires_grad_()
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)
    (found,) = torch.autograd.grad(loss(*inputs), scores)
    assert found.abs().min() > 1e-3  # neither is cut off


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


def test_a_batch_without_an_answer_is_an_error():
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    counted = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ProblemError, match=r"2 conversations has no answer to count"):
        task_loss(logits, ids, counted)
    counted[1, 2] = True
    assert float(task_loss(logits, ids, counted)) == pytest.approx(math.log(5))
