"""Measures with a row for each question, caption and picture, and warnings where they mislead."""

import pytest
import torch

from bilevel.errors import ConvergenceError
from bilevel_problems.mllm_hft.evaluation.measures import auc, chair
from bilevel_problems.mllm_hft.evaluation.questions import Question, own_questions
from bilevel_problems.mllm_hft.evaluation.reports import (
    Findings,
    report_captions,
    report_endings,
    report_pictures,
    report_questions,
)
from bilevel_problems.mllm_hft.sources.mentions import Association, Lexicon
from bilevel_problems.mllm_hft.sources.protocol import OwnQuestion, Scene

WORDS = Lexicon(("cat", "dog"))


def scene(name, *objects, **options):
    return Scene((), "A cat.", {}, id=name, objects=frozenset(objects), **options)


SCENES = [scene("x", "dog"), scene("y", "cat")]
ASKED = [Question(0, "Is there a dog?", True, "dog"), Question(1, "Is there a dog?", False, "dog")]


def test_pope_from_logits_and_from_texts_with_rows():
    found = Findings()
    scores = torch.tensor([1.5, 0.5])
    report_questions(found, "pope_random", ASKED, SCENES, scores, ["Yes.", "No."])
    assert found.metrics["pope_random/accuracy"] == 0.5
    assert found.metrics["pope_random/parsed_accuracy"] == 1.0
    assert found.metrics["pope_random/auc"] == 1.0
    assert "pope_random/blind_accuracy" in found.metrics
    first, second = found.rows["questions"]
    assert first == {
        "id": "x", "group": "pope_random", "question": "Is there a dog?", "name": "dog",
        "answer": True, "score": 1.5, "said": "Yes.", "parsed": True,
    }  # fmt: skip
    rows = (first, second)
    yes, no = ([r["score"] for r in rows if r["answer"] is side] for side in (True, False))
    assert auc(torch.tensor(yes), torch.tensor(no)) == found.metrics["pope_random/auc"]


def test_ambers_questions_are_measured_its_way_and_as_a_whole():
    found = Findings()
    report_questions(found, "amber_existence", ASKED, SCENES, torch.tensor([1.0, 1.0]))
    report_questions(found, "amber_relation", ASKED[1:], SCENES, torch.tensor([-1.0]))
    found.metrics["amber/chair"] = 0.25
    found.finish()
    assert found.metrics["amber_existence/recall"] == 0.0  # one "no", answered yes
    assert found.metrics["amber_discriminative/recall"] == 0.5
    assert found.metrics["amber_discriminative/precision"] == 1.0
    f1 = found.metrics["amber_discriminative/f1"]
    assert found.metrics["amber/score"] == pytest.approx((1 - 0.25 + f1) / 2)
    with pytest.raises(ConvergenceError, match="amber_existence: 1 of 2 scores"):
        report_questions(Findings(), "amber_existence", ASKED, SCENES, torch.tensor([1, torch.nan]))


def test_captions_with_rows_that_give_the_measure_again():
    found, said = Findings(), ["A dog and a cat.", "Cats."]
    report_captions(found, said, [True, True], SCENES, WORDS)
    rows = found.rows["captions"]
    assert rows[0] == {
        "id": "x", "caption": "A dog and a cat.", "ended": True, "mentions": 2,
        "absent": ["cat"], "covered": ["dog"], "present": ["dog"],
    }  # fmt: skip
    again = chair([WORDS.names(row["caption"]) for row in rows], [r["present"] for r in rows])
    assert {f"chair/{n}": v for n, v in again.items()}.items() <= found.metrics.items()
    assert found.metrics["chair/without_object"] == 0
    assert not found.warnings


def test_captions_of_no_object_are_counted_and_said():
    found = Findings()
    report_captions(found, ["It is sunny.", "A dog and a"], [True, False], SCENES, WORDS)
    assert found.metrics["chair/without_object"] == 0.5
    assert set(found.warnings) == {"captions_without_object"}
    assert "50% of 2 captions name none" in found.warnings["captions_without_object"]
    assert "source.synonyms" in found.warnings["captions_without_object"]


def test_captions_cut_short_are_counted_and_said_with_the_remedy():
    found = Findings()
    report_endings(found, [True, False, True, True], 48)
    assert found.metrics == {"captions/cut_short": 0.25}
    (message,) = found.warnings.values()
    assert "25% of 4 captions were cut after 48 tokens" in message
    assert "raise problem.caption_tokens" in message
    few = Findings()
    report_endings(few, [False, *[True] * 19], 48)
    assert few.metrics["captions/cut_short"] == pytest.approx(0.05)
    assert not few.warnings


def test_pictures_without_a_list_of_objects_are_left_out_and_said():
    found = Findings()
    scenes = [SCENES[0], scene("z", annotated=False)]
    report_captions(found, ["A dog.", "A cat."], [True, True], scenes, WORDS)
    assert found.metrics["chair/chair_i"] == 0.0
    assert [row["id"] for row in found.rows["captions"]] == ["x"]
    assert "1 of 2 evaluated pictures" in found.warnings["annotations"]
    nothing = Findings()
    report_captions(nothing, ["A cat."], [True], scenes[1:], WORDS)
    assert not nothing.metrics
    assert nothing.warnings


def test_ambers_captions():
    found = Findings()
    words = Association({"sea": ("water",), "boat": ("ship",)})
    scenes = [scene("1", "sea", lures=frozenset({"boat"}))]
    said = ["Ships on the water."]
    report_captions(found, said, [True], scenes, Lexicon(words.words()), words)
    assert found.metrics["amber/chair"] == 0.5
    assert found.metrics["amber/cover"] == 1.0
    assert found.metrics["amber/cog"] == 1.0
    assert found.rows["captions"][0]["lured"] == ["boat"]


def test_pictures_have_their_cosines():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    false = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [9.0, 9.0]]])
    present = torch.tensor([[True, True], [True, False]])
    found = Findings()
    report_pictures(found, image, text, false, present, ("object", "count"), SCENES)
    first, second = found.rows["pictures"]
    assert first == {"id": "x", "true": 1.0, "hallucinated": {"object": 0.0, "count": 1.0}}
    assert second["true"] == pytest.approx(0.5**0.5)
    assert set(second["hallucinated"]) == {"object"}


def test_questions_that_come_with_pictures():
    own = [OwnQuestion("Is it?", True, "pope_random", "it"), OwnQuestion("Why?", False, "own")]
    found = own_questions([SCENES[0], scene("q", questions=tuple(own))])
    assert found == {
        "pope_random": (Question(1, "Is it?", True, "it"),),
        "own": (Question(1, "Why?", False, "Why?"),),
    }
