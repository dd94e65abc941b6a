"""Measures on examples small enough to compute by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel_problems.mllm_hft.evaluation.measures import (
    alignment,
    auc,
    centroid_distance,
    chair,
    gap,
    pope,
    preference,
    recall_at_1,
    silhouette,
    uniformity,
)


def test_pope_by_hand():
    scores = torch.tensor([2.0, 1.0, -1.0, 0.5, -0.5, -2.0])
    answers = torch.tensor([True, True, True, False, False, False])
    got = pope(scores, answers)  # TP 2, FN 1, FP 1, TN 2
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["precision"] == pytest.approx(2 / 3)
    assert got["recall"] == pytest.approx(2 / 3)
    assert got["f1"] == pytest.approx(2 / 3)
    assert got["yes_ratio"] == pytest.approx(0.5)
    assert got["auc"] == pytest.approx(7 / 9)  # pairs won: 3 + 3 + 1


def test_a_model_that_says_yes_to_everything():
    got = pope(torch.ones(4), torch.tensor([True, False, True, False]))
    assert got == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1, "auc": 0.5}
    )


def test_a_model_that_says_no_divides_nothing_by_nothing():
    got = pope(-torch.ones(4), torch.tensor([True, False, True, False]))
    assert (got["precision"], got["recall"], got["f1"], got["yes_ratio"]) == (0, 0, 0, 0)


def test_shifting_the_scores_moves_the_yes_ratio_and_not_the_auc():
    g = torch.Generator().manual_seed(0)
    scores, answers = torch.randn(50, generator=g), torch.rand(50, generator=g) > 0.5
    first, second = pope(scores, answers), pope(scores + 1, answers)
    assert first["auc"] == pytest.approx(second["auc"])
    assert first["yes_ratio"] < second["yes_ratio"]


def test_auc_is_the_share_of_pairs():
    g = torch.Generator().manual_seed(1)
    positive = torch.randint(5, (13,), generator=g).float()
    negative = torch.randint(5, (9,), generator=g).float()
    wins = sum((p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist())
    assert auc(positive, negative) == pytest.approx(wins / (13 * 9))
    assert auc(positive, negative) + auc(negative, positive) == pytest.approx(1)
    assert auc(positive, negative[:0]) == 0.5


def test_chair_by_hand():
    said = [{"cat", "dog"}, {"cat"}, set(), {"sun", "moon", "cat"}]
    there = [{"cat"}, {"cat", "dog"}, {"sun"}, {"cat"}]
    got = chair(said, there)  # 6 named, 3 absent; 2 of 4 captions; 3 of 5 present
    assert got == pytest.approx({"chair_i": 3 / 6, "chair_s": 2 / 4, "coverage": 3 / 5})


def test_saying_nothing_hallucinates_nothing_and_covers_nothing():
    assert chair([set(), set()], [{"a"}, {"b"}]) == {"chair_i": 0, "chair_s": 0, "coverage": 0}


def test_centroid_distance_and_alignment_ignore_length():
    image = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    text = torch.tensor([[0.0, 2.0], [0.0, 7.0]])
    # centroids (½, ½) and (0, 1); pair distances² 2 and 0
    assert centroid_distance(image, text) == pytest.approx(math.sqrt(0.5))
    assert alignment(image, text) == pytest.approx(1.0)
    assert centroid_distance(image, image.flip(0)) == pytest.approx(0.0, abs=1e-7)
    assert alignment(image, image.flip(0)) == pytest.approx(2.0)


def test_uniformity_by_hand():
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-4.0, 0.0]])  # squared distances 2, 4, 2
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(points) == pytest.approx(expected, rel=1e-5)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0.0, abs=1e-5)


def test_preference_counts_present_kinds_and_halves_ties():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    false = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.1], [0.0, 1.0]]])
    present = torch.tensor([[True, True], [True, False]])
    assert preference(image, text, false, present) == pytest.approx((1 + 0.5 + 0) / 3)
    assert preference(image, text, false, torch.zeros_like(present)) == 0.5


def test_recall_at_1_reads_the_caption():
    image = torch.eye(3)
    text = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert recall_at_1(image, text, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert recall_at_1(image, text, ["same", "same", "c"]) == 1.0


def test_silhouette_by_hand():
    # Clusters {e1, e1} and {e2, e2}: own distance 0, other √2.
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert silhouette(first, second) == pytest.approx(1.0)
    # The same points in both: own distance √2, other √2 / 2, so (½ − 1) for each.
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert silhouette(mixed, mixed) == pytest.approx(-0.5)


def test_a_perfect_model_has_a_perfect_gap():
    image = torch.eye(4)
    false = image.roll(1, 0)[:, None]
    present = torch.ones(4, 1, dtype=torch.bool)
    got = gap(image, image.clone(), false, present, ["a", "b", "c", "d"])
    assert got["centroid_distance"] == got["alignment"] == 0
    assert got["p_true_over_hallucinated"] == got["auc_true_vs_hallucinated"] == 1
    assert got["recall_at_1"] == 1
    worse = gap(image, image.roll(2, 0), false, present, ["a", "b", "c", "d"])
    assert worse["recall_at_1"] == 0
    assert worse["alignment"] == pytest.approx(2)
