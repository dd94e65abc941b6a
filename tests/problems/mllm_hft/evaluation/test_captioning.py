"""CHAIR by mention and AMBER's generative part, by hand and with planted errors."""

import pytest

from bilevel.errors import ProblemError
from bilevel_problems.mllm_hft.evaluation.measures import (
    amber_generative,
    amber_row,
    amber_score,
    chair,
    chair_rows,
    without_object,
)
from bilevel_problems.mllm_hft.sources.mentions import Association, Lexicon

WORDS = Lexicon(("cat", "dog", "person"), {"person": ("man", "woman")})


def test_every_mention_counts():
    said = [WORDS.names("A dog chases a dog past a cat."), WORDS.names("a man, a woman")]
    got = chair(said, [{"cat"}, {"person"}])
    assert got == pytest.approx({"chair_i": 2 / 5, "chair_s": 1 / 2, "coverage": 2 / 2})
    once = chair([set(names) for names in said], [{"cat"}, {"person"}])
    assert once["chair_i"] == pytest.approx(1 / 3)  # negative control


def test_a_planted_object_is_found_and_named():
    true = "A man and a cat."
    (row,) = chair_rows([WORDS.names(true)], [{"cat", "person"}])
    assert row == {
        "mentions": 2, "absent": [], "covered": ["cat", "person"], "present": ["cat", "person"]
    }  # fmt: skip
    (row,) = chair_rows([WORDS.names(true + " Two dogs look on.")], [{"cat", "person"}])
    assert row["absent"] == ["dog"]


def test_rows_add_up_to_the_measure():
    said = [("dog", "dog", "cat"), (), ("person",)]
    there = [{"dog"}, {"cat"}, {"cat", "dog"}]
    rows = chair_rows(said, there)
    got = chair(said, there)
    assert got["chair_i"] == sum(len(r["absent"]) for r in rows) / sum(r["mentions"] for r in rows)
    assert got["chair_s"] == sum(bool(r["absent"]) for r in rows) / 3
    assert got["coverage"] == sum(len(r["covered"]) for r in rows) / 4


def test_captions_that_name_nothing_are_counted():
    assert without_object([WORDS.names("It is a sunny day."), ("dog",), (), ()]) == 3 / 4
    assert without_object([]) == 0


def test_nothing_said_is_zero():
    assert set(chair([], []).values()) == {0.0}


def test_as_many_captions_as_pictures_are_needed():
    with pytest.raises(ProblemError, match="2 captions for 1 pictures"):
        chair([(), ()], [()])
    with pytest.raises(ProblemError, match="amber: 1 captions for 2"):
        amber_generative([()], [(), ()], [()], Association({}))


ASSOCIATION = Association(
    {"beach": ("sand", "coast"), "sea": ("water",), "boat": ("ship",), "dog": ("puppy",)},
    safe=frozenset({"picture"}),
)


def test_amber_by_hand():
    said = [
        # right: sand (says beach), water; a lure: ship (says boat); wrong, no lure: dog
        ("sand", "water", "ship", "dog", "dog"),
        # right: sea; the safe word is a mention and never wrong
        ("sea", "picture"),
        (),
    ]
    truth = [{"beach", "sea"}, {"sea"}, {"dog", "beach"}]
    lures = [{"boat", "dog"}, {"boat"}, {"boat"}]
    lures[0].discard("dog")
    got = amber_generative(said, truth, lures, ASSOCIATION)
    assert got == pytest.approx(
        {
            "chair": 3 / 7,  # ship, dog, dog of 5 + 2 mentions
            "cover": 3 / 5,  # beach, sea; sea; neither of two
            "hal": 1 / 3,
            "cog": 1 / 3,  # one boat of three listed
            "cog_of_mentions": 1 / 7,
        }
    )


def test_a_word_that_says_an_object_of_the_picture_is_no_lure():
    both = Association({"sea": ("water",), "lake": ("water",)})
    row = amber_row(("water", "lake"), {"sea"}, {"lake"}, both)
    assert (row["absent"], row["lured"], row["lured_mentions"]) == (["lake"], ["lake"], 1)
    row = amber_row(("water",), {"sea"}, {"lake"}, both)
    assert (row["absent"], row["lured"], row["covered"]) == ([], [], ["sea"])


def test_ambers_words_are_read_from_captions():
    reader = Lexicon(ASSOCIATION.words())
    assert reader.names("The ships lie off the coast; puppies watch.") == (
        "ship", "coast", "puppy"
    )  # fmt: skip


def test_amber_score():
    assert amber_score(chair=0.1, f1=0.8) == pytest.approx(0.85)
