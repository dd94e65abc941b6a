"""Objects named in natural English: case, punctuation, plurals, phrases, synonyms, mentions."""

import pytest

from bilevel_problems.mllm_hft.sources import language
from bilevel_problems.mllm_hft.sources.coco_objects import NAMES, SYNONYMS
from bilevel_problems.mllm_hft.sources.mentions import Lexicon, mentioned
from bilevel_problems.mllm_hft.sources.negation import affirmed
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from bilevel_problems.mllm_hft.sources.words import (
    article,
    counted,
    indefinite,
    is_plural,
    plural,
    plurals,
)

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
        # words that are as often no object
        ("A couple of zebras standing in a field.", ("zebra",)),
        ("A family of ducks", ("bird",)),
        ("A crowd of sheep", ("sheep",)),
        ("A crowd of people", ("person",)),
        ("People watch a baseball game", ("person",)),
        ("A man steers a boat", ("person", "boat")),
        ("Two men cook chicken", ("person",)),
        ("a wristwatch", ("clock",)),
        ("A pitcher of water", ()),
        ("Glass pitchers and pitchers of tea", ()),
        ("A pitcher throws a ball", ("person", "sports ball")),
        ("a jet ski, a jet; skis", ("airplane", "skis")),
        ("a record player", ()),
        ("two players", ("person",)),
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


def test_a_group_is_no_person_where_a_word_for_people_says_it_and_a_group_where_it_is_a_name():
    people = Lexicon(("person", "zebra"), {"person": ("couple", "pitcher")})
    assert people.names("a couple of zebras; a couple; a pitcher of milk") == ("zebra", "person")
    groups = Lexicon(("crowd", "pitcher"))
    assert groups.names("a crowd of people, pitchers of milk") == ("crowd", "pitcher")


def test_a_listed_word_is_read_as_a_caption_is():
    words = Lexicon(("dog", "cell phone", "skis"), {"dog": ("puppy",)})
    for word, name in [
        ("puppy", "dog"), ("Puppies", "dog"), ("DOGS", "dog"), ("Cell-Phones", "cell phone"),
        ("ski", "skis"),
    ]:  # fmt: skip
        assert words.name_of(word) == name
        assert words.knows(word)
    for other in ("cat", "hot dog"):  # negative control
        assert words.name_of(other) == other
        assert not words.knows(other)


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("Two zebras watch the road with no car in sight.", ("zebra",)),
        ("An empty room with no dogs.", ()),
        ("A zebra without a person nearby.", ("zebra",)),
        ("no visible cars on the road with a truck", ("truck",)),
        ("There aren\u2019t any people at the bench", ("bench",)),
        ("There is not one person on the bus", ("bus",)),
        ("a dog that isn't wearing a tie next to a cat", ("dog", "cat")),
        ("He does not have a dog", ()),
        ("You cannot see any car", ()),
        ("no sign of a dog; a cat", ("cat",)),
        ("a road free of cars, with a bus", ("bus",)),
        ("a bench lacking a person", ("bench",)),
        ("neither a dog nor a cat", ()),
        ("no cats, dogs or birds and a horse", ("horse",)),
        ("There are no cats or dogs on the couch.", ("couch",)),
        ("a table without any plates or cups", ("dining table",)),
        ("The man has no tie and no backpack", ("person",)),
        # what is not denied
        ("A man with no helmet riding a motorcycle", ("person", "motorcycle")),
        ("A man without a shirt riding a horse", ("person", "horse")),
        ("The dog is not on the couch", ("dog", "couch")),
        ("not a dog but a cat", ("cat",)),
        ("It is not just a dog", ("dog",)),
        ("A not yet eaten pizza", ("pizza",)),
        ("no one riding the bike", ("bicycle",)),
        ("without touching the ball", ("sports ball",)),
        ("A street with no people and a dog", ("dog",)),
        ("no car, just a bus", ("bus",)),
        ("No. A dog.", ("dog",)),
    ],
)
def test_what_a_caption_denies_is_not_there(text, there):
    assert tuple(mention.name for mention in affirmed(text, COCO.mentions(text))) == there
    assert set(there) <= set(COCO.names(text))  # where every mention counts, as in CHAIR


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


@pytest.mark.parametrize(
    ("name", "phrase", "two"),
    [
        ("skis", "a pair of skis", "two pairs of skis"),
        ("scissors", "a pair of scissors", "two pairs of scissors"),
        ("cats", "some cats", "two cats"),
        ("wine glasses", "some wine glasses", "two wine glasses"),
        ("people", "some people", "two people"),
        ("zebras", "some zebras", "two zebras"),
    ],
)
def test_a_name_that_is_a_plural_stays_one(name, phrase, two):
    assert is_plural(name)
    assert plurals(name) == (name,)
    assert f"{indefinite(name)} {name}" == phrase
    assert counted(name, "two") == two


@pytest.mark.parametrize(
    ("name", "two"),
    [
        ("bus", "two buses"), ("glass", "two glasses"), ("tennis", "two tennises"),
        ("canvas", "two canvases"), ("octopus", "two octopuses"), ("sheep", "two sheep"),
        ("lens", "two lenses"), ("ski", "two skis"), ("mouse", "two mice"),
    ],
)  # fmt: skip
def test_a_name_in_s_need_not_be_a_plural(name, two):  # negative control
    assert not is_plural(name)
    assert counted(name, "two") == two


def test_articles_go_by_the_sound():
    an = ("hour", "honest man", "heir", "umbrella", "usher", "SUV", "MP", "urn", "uninhabited hut")
    a = (
        "uniform",
        "unicorn",
        "utensil",
        "urinal",
        "ewe",
        "one-way sign",
        "TV",
        "horse",
        "European",
    )
    assert [article(name) for name in an] == ["an"] * len(an)
    assert [article(name) for name in a] == ["a"] * len(a)
