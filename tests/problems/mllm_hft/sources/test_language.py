"""The language is closed, and says what the statement says."""

import hashlib
from random import Random

import pytest

from bilevel.rng import stream
from bilevel_problems.mllm_hft.evaluation.questions import STRATEGIES, cooccurrence, questions
from bilevel_problems.mllm_hft.models.pretrain import dialogues
from bilevel_problems.mllm_hft.sources.language import (
    DESCRIBE,
    NO,
    YES,
    Group,
    Relation,
    Statement,
    ask_object,
    describe,
    mentioned,
    plural,
    words,
    write,
)
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.protocol import Thing
from bilevel_problems.mllm_hft.sources.shapes import Shapes

SOURCES = [Shapes(), Photos()]


def said(source):
    """Every token of captions, lies and questions about many scenes."""
    random = stream(0, "said")
    scenes = source.scenes(3000, biased=False, generator=random)
    texts = [DESCRIBE, YES, NO]
    texts += [text for s in scenes for text in (s.caption, *s.hallucinated.values())]
    asked = questions(
        scenes,
        strategy="random",
        vocabulary=source.vocabulary,
        per_scene=4,
        generator=random,
    )
    return {token for text in [*texts, *(q.text for q in asked)] for token in text.split(" ")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: type(s).__name__)
def test_words_are_all_that_is_ever_said(source):
    listed = words(source)
    assert len(set(listed)) == len(listed)
    assert listed == words(type(source)())
    spoken = said(source)
    assert spoken <= set(listed)
    # nor much more: the two numbers that no scene of these sources reaches
    assert set(listed) - spoken <= {"four", "five"}


def test_one_source_does_not_speak_the_words_of_another():  # negative control
    assert not said(SOURCES[0]) <= set(words(SOURCES[1]))


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("star", "stars"),
        ("cross", "crosses"),
        ("bus", "buses"),
        ("fox", "foxes"),
        ("torch", "torches"),
        ("cherry", "cherries"),
        ("key", "keys"),
        ("tomato", "tomatoes"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_plurals_of_a_source_are_no_names_of_it():
    for source in SOURCES:
        names = set(source.vocabulary)
        assert not {plural(n) for n in names if plural(n) != n} & names


def test_captions_are_written_as_english():
    groups = (Group(2, "red", "star"), Group(1, "blue", "ring"), Group(1, None, "dog"))
    assert write(Statement(groups[:1])) == "two red stars ."
    assert write(Statement(groups[:2])) == "two red stars and one blue ring ."
    assert write(Statement(groups, Relation(0, "above", 2))) == (
        "two red stars , one blue ring and one dog . the red stars are above the dog ."
    )
    assert write(Statement(groups, Relation(2, "left of", 0))).endswith(
        "the dog is left of the red stars ."
    )


def test_ordering_keeps_what_is_said():
    groups = (Group(1, "red", "star"), Group(2, "blue", "ring"))
    statement = Statement(groups, Relation(0, "above", 1)).ordered(("ring", "star"))
    assert write(statement) == (
        "two blue rings and one red star . the red star is above the blue rings ."
    )


def test_questions_are_written_as_english():
    assert ask_object("star") == "is there a star ?"
    assert ask_object("apple") == "is there an apple ?"


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        (Shapes(), "e9c71030d49d03426b188f9b7e41db318cec2e631be6b4ebee3c965fa8f54253"),
        (Photos(), "22c63ad42f808d59fae974c4d545730fb63ce030847f41a15811d12097dfc4fd"),
    ],
    ids=lambda value: value[:6] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_said_of_drawn_scenes_stays_what_it_was_to_the_byte(source, digest):
    """Shipped figures are of models that were trained on these texts."""
    assert hashlib.sha256("\n".join(texts(source)).encode()).hexdigest() == digest


def texts(source):
    generator, found = stream(0, "texts"), [str(words(source))]
    scenes = ()
    for biased in (True, False):
        scenes = source.scenes(200, biased=biased, generator=generator)
        turns = dialogues(scenes, source, generator)
        found += [repr((scene.caption, sorted(scene.hallucinated.items()))) for scene in scenes]
        found += map(repr, turns)
    together = cooccurrence(scenes, source.vocabulary)
    for strategy in STRATEGIES:
        asked = questions(
            scenes, strategy=strategy, vocabulary=source.vocabulary, per_scene=6,
            generator=generator, cooccurrence=together,
        )  # fmt: skip
        found += [repr(question.text) for question in asked]
    return found


def test_only_clear_relations_are_stated():
    def relation(*things):
        return describe(things, ("a", "b"), Random(0)).relation

    a = Thing("a", None, 0.5, 0.5)
    assert relation(a) is None
    assert relation(a, Thing("b", None, 0.6, 0.4)) is None
    assert relation(a, Thing("b", None, 0.7, 0.4)) in (
        Relation(0, "left of", 1),
        Relation(1, "right of", 0),
    )
    # on both sides of a: neither left nor right of it, but above
    both = (Thing("b", None, 0.1, 0.2), Thing("b", None, 0.9, 0.2))
    assert relation(a, *both) in (Relation(0, "below", 1), Relation(1, "above", 0))


def test_mentioned_finds_names_in_singular_and_plural_and_no_parts_of_words():
    vocabulary = ("mouse", "bus", "star", "sheep")
    assert mentioned("two mice and one bus .", vocabulary) == {"mouse", "bus"}
    assert mentioned("three sheep and one starling .", vocabulary) == {"sheep"}
    assert mentioned("", vocabulary) == frozenset()
