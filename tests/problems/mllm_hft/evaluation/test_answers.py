"""Yes/no measures: hand calculations, NaN, nothing asked, parsing, and the blind rule."""

import itertools
import math

import pytest
import torch

from bilevel.errors import ConvergenceError, ProblemError
from bilevel_problems.mllm_hft.evaluation.measures import (
    amber_discriminative,
    auc,
    blind,
    parse_answer,
    pope,
    pope_parsed,
)

NAN = math.nan
YES, NO = True, False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_score_is_no_answer(dtype):
    answers = torch.tensor([YES, YES, NO, NO])
    scores = torch.tensor([2, NAN, -1, NAN], dtype=dtype)
    with pytest.raises(ConvergenceError, match="2 of 4 scores are NaN"):
        pope(scores, answers)
    with pytest.raises(ConvergenceError, match="1 of 4 scores"):
        auc(scores[:2], torch.zeros(2, dtype=dtype))
    assert pope(scores[[0, 2]], answers[[0, 2]])["accuracy"] == 1  # negative control


def test_an_infinite_score_is_an_answer():
    got = pope(torch.tensor([math.inf, -math.inf, 1.0]), torch.tensor([YES, NO, NO]))
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["auc"] == 1.0


def test_nothing_asked_is_zero_and_auc_is_chance():
    nothing = pope(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert nothing.pop("auc") == 0.5
    assert set(nothing.values()) == {0.0}
    assert set(pope_parsed([], torch.empty(0, dtype=torch.bool)).values()) == {0.0}
    empty = torch.empty(0, dtype=torch.bool)
    assert blind([], empty, []) == {"blind_accuracy": 0.0, "blind_auc": 0.5}
    assert set(amber_discriminative(empty, empty).values()) == {0.0}


def test_a_score_of_zero_is_a_no():
    got = pope(torch.zeros(2), torch.tensor([YES, NO]))
    assert (got["accuracy"], got["yes_ratio"], got["auc"]) == (0.5, 0.0, 0.5)


def test_as_many_scores_as_answers_are_needed():
    with pytest.raises(ProblemError, match=r"\(3,\)"):
        pope(torch.zeros(3), torch.tensor([YES]))  # would broadcast
    with pytest.raises(ProblemError, match="2 texts for 1"):
        pope_parsed(["yes", "no"], torch.tensor([YES]))
    with pytest.raises(ProblemError, match="1 names"):
        blind(["a"], torch.tensor([YES, NO]), [0, 1])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", True),
        ("yes, there is a dog.", True),
        ("\n YES.", True),
        ("No, there isn't.", False),
        ("There is no dog in the image.", False),
        ("There is not a dog.", False),
        ("It doesn\u2019t show a dog", False),
        ("Yes. There is no cat, though.", True),  # the first sentence answers
        ("Nothing of the kind", None),
        ("A dog is on the grass.", None),
        ("", None),
        ("...", None),
        ("notable yesterday", None),  # words, not their beginnings
        ("There wasn't a dog.", False),
        ("It won\u2019t be there", False),
        ("there hasn't been one", False),
        ("There arent any", False),
        ("I want it", None),  # no verb with n't
        ("There are none.", False),
        ("I cannot see any dog", False),
        ("I don't think so.", False),
        ("1. No", False),
        ("1. Yes", True),
        ("**No**, it is a cat", False),
        ("Answer: Yes\nNo", True),
        ("I can't tell", None),
        ("I cannot tell from this image.", None),
        ("I'm sorry, I can't help with that.", None),
        ("I'm not sure", None),
        ("It is not clear.", None),
        ("I do not know", None),
        ("It is impossible to say", None),
        ("Yes, but I'm not sure", True),
        ("No, I can't tell", False),
        ("It is not a clear picture of a dog", False),
    ],
)
def test_answers_are_read_from_the_first_sentence(text, answer):
    assert parse_answer(text) is answer


def test_parsed_pope_by_hand():
    said = ["Yes", "No.", "I can't tell.", "no", "Yes!"]
    answers = torch.tensor([YES, YES, NO, NO, NO])  # TP 1, FN 1, FP 2, TN 1
    got = pope_parsed(said, answers)
    assert got["accuracy"] == pytest.approx(2 / 5)
    assert got["precision"] == pytest.approx(1 / 3)
    assert got["recall"] == pytest.approx(1 / 2)
    assert got["f1"] == pytest.approx(2 / 5)
    assert got["yes_ratio"] == pytest.approx(3 / 5)  # what says neither is a yes
    assert got["unparsed"] == pytest.approx(1 / 5)


def test_logits_and_texts_that_agree_measure_the_same():
    scores = torch.tensor([2.0, -1.0, 0.5, -3.0])
    answers = torch.tensor([YES, YES, NO, NO])
    said = ["yes" if score > 0 else "no" for score in scores]
    from_logits, from_text = pope(scores, answers), pope_parsed(said, answers)
    shared = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert all(from_logits[name] == from_text[name] for name in shared)


def test_the_blind_rule_answers_what_names_give_away():
    names = ["dog", "cat"] * 10
    pictures = [i // 2 for i in range(20)]
    answers = torch.tensor([YES, NO] * 10)
    assert blind(names, answers, pictures) == {"blind_accuracy": 1.0, "blind_auc": 1.0}


def test_the_blind_rule_is_fitted_on_other_pictures():
    """Names asked once each give nothing away; fitted on itself, the rule would be right on all."""
    answers = torch.tensor([YES, NO] * 10)
    got = blind([f"name {i}" for i in range(20)], answers, list(range(20)))
    assert got["blind_accuracy"] <= 0.5
    assert got["blind_auc"] == 0.5


def test_the_blind_rule_by_hand():
    # Two folds: pictures 0 and 2, pictures 1 and 3; one question a picture, all of one name.
    answers = torch.tensor([YES, NO, YES, YES])
    got = blind(["dog"] * 4, answers, [0, 1, 2, 3], folds=2)
    # Fitted on {NO, YES}: a tie, and of all of that fold's too, so yes: right on 0 and 2.
    # Fitted on {YES, YES}: yes: wrong on 1, right on 3.
    assert got["blind_accuracy"] == 3 / 4
    # shares of yes: 1.5/3 for 0 and 2, 2.5/3 for 1 and 3; pairs with 1: lost, lost, tied
    assert got["blind_auc"] == pytest.approx(0.5 / 3)


def test_amber_takes_no_as_the_positive_class():
    said = torch.tensor([NO, NO, NO, YES, YES, YES])
    answers = torch.tensor([NO, NO, YES, YES, NO, YES])  # of "no": TP 2, FP 1, FN 1, TN 2
    got = amber_discriminative(said, answers)
    assert got == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    )
    always_yes = amber_discriminative(torch.ones(3).bool(), torch.tensor([YES, YES, NO]))
    assert (always_yes["precision"], always_yes["recall"]) == (0, 0)  # and not 2/3, 1
    with pytest.raises(ProblemError, match="1 answers given for 3"):
        amber_discriminative(torch.ones(1).bool(), answers[:3])


def test_auc_with_ties_and_infinities_is_the_share_of_pairs():
    positive = torch.tensor([math.inf, 0.0, 0.0])
    negative = torch.tensor([0.0, -math.inf])
    pairs = itertools.product(positive.tolist(), negative.tolist())
    wins = sum((p > n) + (p == n) / 2 for p, n in pairs)
    assert auc(positive, negative) == pytest.approx(wins / 6)
