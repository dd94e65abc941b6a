"""Reads a caption with its own eyes and says what in it is false of the things that are there.

Shares no code with the writer of captions; plurals are spelled out here.
"""

import re
from collections import Counter
from collections.abc import Sequence

from bilevel_problems.mllm_hft.sources.protocol import Thing

NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
IRREGULAR = {"crosses": "cross", "buses": "bus", "mice": "mouse", "sheep": "sheep"}
COUNTED = re.compile(r"(one|two|three|four|five) (?:(\w+) )?(\w+)")
RELATED = re.compile(r"the (.+) (is|are) (left of|right of|above|below) the (.+)")


def singular(word: str) -> str:
    return IRREGULAR.get(word) or (word if word == "cross" else word.removesuffix("s"))


def key(words: str, *, plural: bool) -> tuple[str, str | None]:
    """(name, colour) of a noun phrase."""
    *colour, noun = words.split()
    assert len(colour) <= 1
    assert all(word in COLOURS for word in colour)
    if plural:
        assert noun in IRREGULAR or noun.endswith("s"), noun
        noun = singular(noun)
    return noun, colour[0] if colour else None


def errors(caption: str, things: Sequence[Thing]) -> list[str]:
    """Every false claim, as its kind; [] for a true and complete caption."""
    assert caption == " ".join(caption.split())
    assert caption == caption.lower()
    sentences = caption.removesuffix(" .").split(" . ")
    counted, *related = sentences
    assert len(related) <= 1
    said = {}
    for part in re.split(r" , | and ", counted):
        number, phrase = part.split(" ", 1)
        said[key(phrase, plural=NUMBER[number] > 1)] = NUMBER[number]
    there = Counter((thing.name, thing.colour) for thing in things)
    found = _counting(said, there)
    return found + [kind for sentence in related for kind in _relating(sentence, said, things)]


def _counting(said: dict, there: Counter) -> list[str]:
    names = {name for name, _ in there}
    found = []
    for (name, colour), number in said.items():
        if name not in names:
            found.append("object")
        elif (name, colour) not in there:
            found.append("attribute")
        elif there[name, colour] != number:
            found.append("count")
    missing = names - {name for name, _ in said}
    return found + ["missing"] * len(missing)


def _relating(sentence: str, said: dict, things: Sequence[Thing]) -> list[str]:
    match = RELATED.fullmatch(sentence)
    assert match, sentence
    first, verb, word, second = match.groups()
    phrases = []
    for phrase in (first, second):
        *colour, noun = phrase.split()
        nouns = (noun, singular(noun))
        known = {
            option for option in said if option[0] in nouns and [option[1]] == (colour or [None])
        }
        assert len(known) == 1, sentence
        phrases += known
    assert (said[phrases[0]] > 1) == (verb == "are"), sentence
    groups = [[t for t in things if (t.name, t.colour) == phrase] for phrase in phrases]
    holds = {
        "left of": lambda a, b: a.x < b.x,
        "right of": lambda a, b: a.x > b.x,
        "above": lambda a, b: a.y < b.y,
        "below": lambda a, b: a.y > b.y,
    }[word]
    pairs = [(a, b) for a in groups[0] for b in groups[1]]
    return [] if all(holds(a, b) for a, b in pairs) else ["relation"]
