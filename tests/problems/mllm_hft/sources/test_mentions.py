"""Objects named in natural English: case, punctuation, plurals, phrases, synonyms, mentions."""

import pytest

from bilevel_problems.mllm_hft.sources import language
from bilevel_problems.mllm_hft.sources.coco_objects import NAMES, SYNONYMS
from bilevel_problems.mllm_hft.sources.mentions import Lexicon, mentioned
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from bilevel_problems.mllm_hft.sources.words import article, plural, plurals

COCO = Lexicon(NAMES, SYNONYMS)


@pytest.mark.parametrize(
    ("text", "vocabulary", "expected"),
    [
        ("The image shows a Dog, a cat.", ("dog", "cat"), {"dog", "cat"}),
        ("a hot dog", ("dog", "cat"), set()),
        ("Two hot-dogs!", ("dog", "hot dog"), {"hot dog"}),
        ("It is hot. Dogs sleep", ("dog", "hot dog"), {"dog"}),
        ("it is hot, dog", ("dog", "hot dog"), {"dog"}),
        ("a traffic light", ("traffic light",), {"traffic light"}),
        ("Traffic\n lights", ("traffic light", "light"), {"traffic light"}),
        ("a traffic light", ("light",), {"light"}),
        ("MEN and children", ("man", "child"), {"man", "child"}),
        ("wolves; people; mice", ("wolf", "person", "mouse"), {"wolf", "person", "mouse"}),
        ("three firemen", ("fireman",), {"fireman"}),
        ("mongooses and Germans", ("goose", "man"), set()),
        ("the dog's bowl", ("dog", "bowl"), {"dog", "bowl"}),
        ("category, dogma, concatenate", ("dog", "cat"), set()),
        ("two dogs_and a cat1", ("dog", "cat"), {"dog", "cat"}),
        ("skis", ("skis",), {"skis"}),
        ("one ski", ("skis",), {"skis"}),
        ("a glass, a bus", ("glass", "bus"), {"glass", "bus"}),
        ("at 5 o'clock", ("clock",), set()),
        ("", ("dog",), set()),
        ("a dog", (), set()),
        ("a teddy bear", ("bear",), set()),
        ("dog houses at the bus stop", ("dog", "bus"), set()),
        ("a cell phone", ("phone",), {"phone"}),
    ],
)
def test_what_a_text_names(text, vocabulary, expected):
    assert mentioned(text, vocabulary) == expected


def test_every_mention_is_one_with_its_place():
    text = "A Dog and two dogs chase a traffic light."
    found = Lexicon(("dog", "traffic light")).mentions(text)
    assert [(m.name, text[m.start : m.end], m.plural) for m in found] == [
        ("dog", "Dog", False), ("dog", "dogs", True), ("traffic light", "traffic light", False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man and two women ride their bikes.", ("person", "person", "bicycle")),
        ("a baby elephant beside a baby", ("elephant", "person")),
        ("an adult bear; adults", ("bear", "person")),
        ("a passenger jet with passengers", ("airplane", "person")),
        ("a man in a bow tie", ("person", "tie")),
        ("a toilet seat and a seat", ("toilet", "chair")),
        ("motor bike, air planes, suit case", ("motorcycle", "airplane", "suitcase")),
        ("A computer mouse, a laptop computer", ("mouse", "laptop")),
        ("tennis balls and wine glasses", ("sports ball", "wine glass")),
        ("geese and sheep", ("bird", "sheep")),
        ("home plate", ()),
    ],
)
def test_synonyms_of_coco(text, expected):
    assert COCO.names(text) == expected


def test_cocos_table_is_whole():
    assert len(NAMES) == len(set(NAMES)) == 80
    assert "tv" in NAMES
    for name in NAMES:
        assert COCO.names(name) == (name,)
        for word in SYNONYMS[name]:
            assert COCO.names(word) == (name,), word
    words = [word for others in SYNONYMS.values() for word in others]
    assert len(words) == len(set(words))
    assert not set(words) & set(NAMES)


def test_a_name_is_itself_even_where_it_is_anothers_synonym():
    both = Lexicon(("person", "man"), {"person": ("man", "woman")})
    assert both.names("a man, a woman, men") == ("man", "person", "man")


@pytest.mark.parametrize("source", [Shapes(), Photos()], ids=lambda s: type(s).__name__)
def test_names_of_the_shipped_sources_are_found_as_they_were(source):
    """In their closed language every word counts by itself, and so it still does."""
    for scene in _scenes(source):
        for text in (scene.caption, *scene.hallucinated.values()):
            words = set(text.split())
            expected = {n for n in source.vocabulary if {n, plural(n)} & words}
            assert mentioned(text, source.vocabulary) == expected


def _scenes(source):
    from bilevel.rng import stream

    return source.scenes(300, biased=False, generator=stream(0, "mentions"))


def test_mentioned_is_reached_through_the_language():
    assert language.mentioned is mentioned


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("man", "men"), ("child", "children"), ("wolf", "wolves"), ("person", "people"),
        ("goose", "geese"), ("knife", "knives"), ("grandchild", "grandchildren"),
        ("human", "humans"), ("photo", "photos"), ("kangaroo", "kangaroos"), ("zoo", "zoos"),
        ("traffic light", "traffic lights"), ("wine glass", "wine glasses"), ("day", "days"),
        ("cliff", "cliffs"), ("salesperson", "salespeople"),
    ],
)  # fmt: skip
def test_irregular_plurals(one, many):
    assert plural(one) == many


def test_several_plurals_are_understood():
    assert set(plurals("scarf")) == {"scarves", "scarfs"}
    assert {"roofs", "dwarves"} <= {*plurals("roof"), *plurals("dwarf")}
    assert article("Orange") == "an"
