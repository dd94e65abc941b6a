"""The closed language of captions and questions, and its words.

A caption counts every kind of object, in the order of the vocabulary, and relates two of them:
"two red stars and one blue ring . the red stars are left of the blue ring ." Numbers are exact:
"one" means one and no more. A relation holds between all the objects it speaks of. Text is lower case, tokens are separated by
single spaces, "." "," and "?" are tokens of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from .mentions import mentioned
from .protocol import DESCRIBE, Scene, Thing
from .words import article, is_plural, plural

__all__ = [
    "DESCRIBE", "NO", "NUMBERS", "OPPOSITE", "YES", "Group", "Names", "Relation", "Statement",
    "answer", "article", "ask_object", "describe", "mentioned", "plural", "question", "words", "write",
]  # fmt: skip

NUMBERS = ("one", "two", "three", "four", "five")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
YES, NO = "yes", "no"

_GRAMMAR = ("a", "an", "the", "and", "is", "are", "there", "left", "right", "of", "above", "below")
CLEAR = 0.15
"""The least distance, as a part of the picture, at which a relation is stated."""


class Names(Protocol):
    """What the word list needs of a source: every `Source` has it."""

    @property
    def vocabulary(self) -> tuple[str, ...]: ...
    @property
    def colours(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Group:
    """How many objects of one name (and one colour, where colours are known) there are."""

    number: int
    colour: str | None
    name: str


@dataclass(frozen=True)
class Relation:
    """Group `first` is `word` group `second`: every one of its objects is."""

    first: int
    word: str
    second: int


@dataclass(frozen=True)
class Statement:
    """What a caption says, true or false."""

    groups: tuple[Group, ...]
    relation: Relation | None = None

    def change(self, index: int, group: Group) -> Statement:
        """The same statement with another group at `index`, there and in the relation."""
        groups = (*self.groups[:index], group, *self.groups[index + 1 :])
        return replace(self, groups=groups)

    def ordered(self, names: Sequence[str]) -> Statement:
        """The same statement with its groups in the order of `names`."""
        order = sorted(range(len(self.groups)), key=lambda i: names.index(self.groups[i].name))
        groups = tuple(self.groups[i] for i in order)
        if (held := self.relation) is None:
            return Statement(groups)
        first, second = order.index(held.first), order.index(held.second)
        return Statement(groups, Relation(first, held.word, second))


def words(source: Names) -> tuple[str, ...]:
    """Every token that text about scenes of `source` can hold, in an order that stays the same."""
    sentence = (*DESCRIBE.split(), YES, NO, ".", ",", "?")
    names = (word for name in source.vocabulary for word in (name, plural(name)))
    return tuple(dict.fromkeys((*sentence, *_GRAMMAR, *NUMBERS, *source.colours, *names)))


def ask_object(name: str) -> str:
    """The question whether an object is there."""
    return f"is there {article(name)} {name} ?"


def question(scene: Scene, name: str) -> str:
    """The question whether an object is in a scene's picture, as the scene's source puts it.

    Of files as POPE asks, "Is there a kite in the image?", in the source's `ask`; else `ask_object`.
    """
    if scene.ask is None:
        return ask_object(name)
    begins = "Are there" if is_plural(name) else f"Is there {article(name)}"
    return scene.ask.replace("{question}", f"{begins} {name} in the image?")


def answer(scene: Scene, is_yes: bool) -> str:
    """Yes or no, written as the scene's questions are."""
    said = YES if is_yes else NO
    return said if scene.ask is None else said.capitalize()


def describe(things: tuple[Thing, ...], names: Sequence[str], random: Random) -> Statement:
    """All groups in the order of `names`, and one relation (drawn at random) if one is clear.

    Not in an order that comes from the places: it would tell a swapped relation from the text.
    """
    by_name: dict[str, list[Thing]] = {}
    for thing in things:
        by_name.setdefault(thing.name, []).append(thing)
    groups = tuple(Group(len(same), same[0].colour, name) for name, same in by_name.items())
    members = list(by_name.values())
    clear = [
        Relation(i, word, j)
        for i, first in enumerate(members)
        for j, second in enumerate(members)
        if i != j
        for word in _holding(first, second)
    ]
    return Statement(groups, random.choice(clear) if clear else None).ordered(names)


def _holding(first: list[Thing], second: list[Thing]) -> list[str]:
    pairs = [(a, b) for a in first for b in second]
    gaps = {
        "left of": min(b.x - a.x for a, b in pairs),
        "right of": min(a.x - b.x for a, b in pairs),
        "above": min(b.y - a.y for a, b in pairs),
        "below": min(a.y - b.y for a, b in pairs),
    }
    return [word for word, gap in gaps.items() if gap > CLEAR]


def write(statement: Statement) -> str:
    """The statement as text."""
    parts = [f"{NUMBERS[group.number - 1]} {_noun(group)}" for group in statement.groups]
    listed = " and ".join(part for part in (" , ".join(parts[:-1]), parts[-1]) if part)
    if (relation := statement.relation) is None:
        return f"{listed} ."
    first, second = statement.groups[relation.first], statement.groups[relation.second]
    verb = "is" if first.number == 1 else "are"
    return f"{listed} . the {_noun(first)} {verb} {relation.word} the {_noun(second)} ."


def _noun(group: Group) -> str:
    name = group.name if group.number == 1 else plural(group.name)
    return name if group.colour is None else f"{group.colour} {name}"
