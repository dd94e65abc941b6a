"""Captions made wrong in one known way: plausible, deterministic, counted where it cannot be."""

import pytest

from bilevel_problems.mllm_hft.sources.altering import Altering, caption_of
from bilevel_problems.mllm_hft.sources.coco_objects import NAMES, SYNONYMS
from bilevel_problems.mllm_hft.sources.mentions import Lexicon
from bilevel_problems.mllm_hft.sources.protocol import KINDS

COCO = Lexicon(NAMES, SYNONYMS)
PLAIN = Altering(COCO, {})
CAPTION = "A young man throws a red frisbee to two dogs next to an umbrella."
PRESENT = {"person", "frisbee", "dog", "umbrella"}


def lies(caption, present, seeds=40, altering=PLAIN):
    """Every altered caption that some seeds give, by kind."""
    found = {kind: set() for kind in KINDS}
    for seed in range(seeds):
        made = Altering(altering.lexicon, altering.together, seed).all([caption], [present])
        for kind, lie in made.captions[0].items():
            found[kind].add(lie)
    return found


def test_one_kind_is_wrong_and_nothing_else():
    found = lies(CAPTION, PRESENT)
    for lie in found["object"]:
        new = set(COCO.names(lie)) - PRESENT
        assert len(new) == 1, lie
    assert len(found["object"]) > 10
    for kind in ("attribute", "relation", "count"):
        for lie in found[kind]:
            assert COCO.names(lie) == COCO.names(CAPTION), lie
            assert lie != CAPTION
    assert found["count"] == {
        CAPTION.replace("two dogs", f"{number} dogs") for number in ("three", "four")
    }
    assert found["relation"] == {CAPTION.replace("next to", "far away from")}
    assert {"An old man" in lie for lie in found["attribute"]} == {True, False}
    assert any("a blue frisbee" in lie for lie in found["attribute"])


def test_an_expected_absent_object_is_taken_most_often():
    seen = [{"dog", "frisbee"}] * 30 + [{"cat", "couch"}] * 30
    altering = Altering.of(COCO, seen)
    made = altering.all(["A dog and a person."] * 200, [{"dog", "person"}] * 200)
    texts = [found["object"] for found in made.captions]
    kept_dog = [text for text in texts if "dog" in text]
    assert sum("frisbee" in text for text in kept_dog) > 0.7 * len(kept_dog)
    plain = PLAIN.all(["A dog and a person."] * 200, [{"dog", "person"}] * 200).captions
    assert sum("frisbee" in found["object"] for found in plain) < 0.1 * 200  # negative control


def test_every_mention_of_an_object_is_swapped_with_number_capital_and_article():
    two = Lexicon(("dog", "elephant"))
    made = Altering(two, {}).all(["Dogs bark. A dog sleeps by the dog."], [{"dog"}])
    assert made.captions[0]["object"] == "Elephants bark. An elephant sleeps by the elephant."
    apples = Lexicon(("elephant", "cat"))
    (lie,) = Altering(apples, {}).all(["An elephant."], [{"elephant"}]).captions
    assert lie["object"] == "A cat."


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("It is a nice day.", "object"),
        ("It is a nice day.", "attribute"),
        ("It is a nice day.", "relation"),
        ("One of them at 2:30, 5 o'clock or 3.5", "count"),
        ("An orange.", "attribute"),  # the fruit
    ],
)
def test_where_there_is_nothing_to_swap_it_is_counted(caption, kind):
    made = PLAIN.all([caption, CAPTION], [set(), PRESENT])
    assert kind not in made.captions[0]
    assert made.failed[kind] == 1
    assert f"{kind} 1" in made.note(KINDS)
    assert PLAIN.all([CAPTION], [PRESENT]).note(KINDS) == ""


def test_no_object_is_absent():
    assert "object" not in Altering(Lexicon(("dog",)), {}).all(["A dog."], [{"dog"}]).captions[0]


def test_what_is_drawn_depends_on_seed_and_id_alone():
    def made(captions, ids, seed=0):
        found = Altering(COCO, {}, seed).all(captions, [PRESENT] * len(captions), ids)
        return dict(zip(ids, found.captions, strict=True))

    together = made([CAPTION] * 3, ["a", "b", "c"])
    assert made([CAPTION], ["b"])["b"] == together["b"]
    assert together["a"] != together["b"]
    assert made([CAPTION], ["b"], seed=1)["b"] != together["b"]


def test_relations_go_both_ways_where_the_opposite_is_in_use():
    for one, other in [("to the left of", "to the right of"), ("behind", "in front of")]:
        text = "The cat is {} the dog."
        for first, second in ((one, other), (other, one)):
            found = lies(text.format(first), {"cat", "dog"}, seeds=3)
            assert found["relation"] == {text.format(second)}


def test_a_caption_is_written_from_objects():
    assert caption_of({"dog": 2, "cat": 1, "person": 12}) == (
        "There are two dogs, a cat and many people."
    )
    assert caption_of({"orange": 1}) == "There is an orange."
    assert caption_of({}) == ""


def test_what_is_denied_is_not_altered():
    """Its altered caption would be as true: "no cat" of a picture without a dog and a cat."""
    found = lies("A man with no dog.", {"person"})
    assert found["object"]
    assert all(lie.endswith("with no dog.") and "A man" not in lie for lie in found["object"])
    assert not any(lie.startswith("A dog") for lie in found["object"])
    assert lies("An empty room with no dogs.", set())["object"] == set()
    for caption, kind in [
        ("A road with no red car.", "attribute"), ("A road with no car near it.", "relation"),
        ("A road without any two dogs.", "count"), ("A road with no car.", "relation"),
    ]:  # fmt: skip
        assert lies(caption, set())[kind] == set()
        said = caption.replace("no ", "a ").replace("without any", "with")
        assert lies(said, {"car"})[kind]  # negative control


def test_a_plural_name_takes_the_place_of_one_thing_and_of_many():
    words = Lexicon(("dog", "skis"))
    for caption, there, lie in [
        ("A dog.", {"dog"}, "A pair of skis."), ("Two dogs.", {"dog"}, "Two skis."),
        ("A man on skis.", {"skis"}, "A man on dogs."),
    ]:  # fmt: skip
        assert Altering(words, {}).all([caption], [there]).captions[0]["object"] == lie
    assert caption_of({"skis": 1, "scissors": 2}) == (
        "There is a pair of skis and two pairs of scissors."
    )
    assert caption_of({"hour": 1, "uniform": 1}) == "There is an hour and a uniform."
