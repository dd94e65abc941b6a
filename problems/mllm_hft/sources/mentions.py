"""Which objects a text names, read as CHAIR reads captions: natural English against a vocabulary.

CHAIR: Rohrbach et al., EMNLP 2018, arXiv:1809.02156. Text is cut into words, plurals are undone,
the longest phrase counts ("traffic light" is one object, "a hot dog" no dog), "baby" and "adult"
before an animal and "passenger" before a vehicle name no person, synonyms stand for their object,
and every mention counts, not every object once. It differs from the published script in:

1. plurals are made from the vocabulary and not undone by a tagger, so words outside the
   vocabulary and its synonyms are never changed;
2. words of a phrase stand side by side: "hot, dog" is not a hot dog;
3. it knows more compounds ("bus stop", "dog house") and applies them to any vocabulary, and words that
   name no person before "of" ("a pitcher of water").

As in the script, "orange" is the fruit even where it is the colour of another thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

from .words import is_plural, plurals

WORD = re.compile(r"o['\u2019]clock|[^\W\d_]+", re.I)
JOINT = re.compile(r"[\s\-\u2010\u2011]+")
"""What may stand between two words of one phrase."""
KINDS_OF = (
    "traffic light", "traffic signal", "street light", "stop light", "stop sign", "fire truck",
    "fire hydrant", "parking meter", "sports ball", "tennis ball", "tennis racket",
    "baseball glove", "wine glass", "cell phone", "mobile phone", "potted plant", "hair drier",
    "hair dryer", "bow tie", "dining table", "train track", "train station", "bus station",
    "bus stop", "car seat", "car park", "boat house", "bird house", "dog house", "bird cage",
    "bird bath", "cat food", "dog food", "carrot cake", "apple pie", "orange juice",
    "apple juice", "banana bread", "sheep dog", "table cloth", "toilet paper", "suit case",
    "air plane", "motor bike", "motor cycle", "tooth brush", "hand bag", "back pack",
    "skate board", "surf board", "snow board", "key board", "license plate",
)  # fmt: skip
"""Two words for a thing that their last word may name and the first never does."""
OTHER_THINGS = {
    **dict.fromkeys(("hot dog", "corn dog", "teddy bear", "baseball bat", "home plate"), ""),
    **dict.fromkeys(("sea horse", "horse shoe", "star fish", "cow boy", "cow girl"), ""),
    **dict.fromkeys(("table tennis", "computer mouse", "bed spread", "sheep skin"), ""),
    **dict.fromkeys(("jet ski", "semi circle", "record player", "dvd player", "cd player"), ""),
    "toilet seat": "toilet",
    "bear cub": "bear",
    "laptop computer": "laptop",
}
"""Two words for a thing that neither, or only the word given, names."""
NOT_AS_A_SYNONYM = {
    **{f"{word} of": word for word in ("pitcher", "couple", "crowd", "family", "group", "team")},
    **{f"{word} of": word for word in ("pitchers", "couples", "crowds", "families", "groups")},
    **dict.fromkeys(("water pitcher", "glass pitcher"), "pitcher"),
    **dict.fromkeys(("cake batter", "pancake batter"), "batter"),
}
"""Two words that name no person where their one word does: "a pitcher of water", "a couple of zebras".
Where that word is a name itself, they are that."""
ANIMALS = ("animal", "bear", "bird", "cat", "cow", "cub", "dog", "duck", "elephant", "giraffe",
           "goat", "horse", "lion", "monkey", "sheep", "zebra")  # fmt: skip
VEHICLES = ("airplane", "bus", "car", "jet", "plane", "train")
QUALIFIED = (*product(("baby", "adult"), ANIMALS), *product(("passenger",), VEHICLES))


class Mention(NamedTuple):
    """An object named at text[start:end]."""

    name: str
    start: int
    end: int
    plural: bool


@dataclass(frozen=True)
class Lexicon:
    """Object names with their synonyms, and where a text says them."""

    vocabulary: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other words for a name of the vocabulary; a word that is itself a name stays that name."""

    @cached_property
    def _phrases(self) -> dict[tuple[str, ...], _Phrase]:
        return _phrases(self.vocabulary, self.synonyms)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._phrases), default=0)

    def mentions(self, text: str) -> tuple[Mention, ...]:
        """Every mention in reading order, the longest phrase at each place."""
        phrases = self._phrases
        words = list(WORD.finditer(text))
        tokens = [word[0].casefold() for word in words]
        found, at = [], 0
        while at < len(words):
            reach = _reach(text, words, at, self._longest)
            spans = range(at + reach, at, -1)
            end = next((end for end in spans if tuple(tokens[at:end]) in phrases), None)
            if end is None:
                at += 1
                continue
            name, is_plural = phrases[tuple(tokens[at:end])]
            if name is not None:
                found.append(Mention(name, words[at].start(), words[end - 1].end(), is_plural))
            at = end
        return tuple(found)

    def names(self, text: str) -> tuple[str, ...]:
        """The name at each mention: what CHAIR counts."""
        return tuple(mention.name for mention in self.mentions(text))

    def knows(self, word: str) -> bool:
        """Whether a word by itself, whatever its case and number, says a name."""
        phrase = self._phrases.get(_tokens(word))
        return phrase is not None and phrase.name is not None

    def name_of(self, word: str) -> str:
        """The name that a word by itself says; the word, where it says none."""
        phrase = self._phrases.get(_tokens(word))
        return word if phrase is None or phrase.name is None else phrase.name


class _Phrase(NamedTuple):
    name: str | None
    """None: a compound that names no object of the vocabulary."""
    plural: bool


def _phrases(
    vocabulary: Iterable[str], synonyms: Mapping[str, Iterable[str]]
) -> dict[tuple[str, ...], _Phrase]:
    vocabulary = tuple(vocabulary)
    found: dict[tuple[str, ...], _Phrase] = {}

    def add(words: str, name: str | None) -> None:
        for form, many in _forms(words):
            found.setdefault(_tokens(form), _Phrase(name, many))

    for name in vocabulary:
        found[_tokens(name)] = _Phrase(name, is_plural(name))
    for name in vocabulary:
        add(name, name)
    for name in vocabulary:
        for word in synonyms.get(name, ()):
            add(word, name)
    known = {" ".join(words): phrase.name for words, phrase in found.items()}
    heads = {compound: compound.split()[1] for compound in KINDS_OF}
    for compound, named in {**heads, **OTHER_THINGS}.items():
        add(compound, known.get(compound.replace(" ", "")) or known.get(named))
    own = {form: name for name in vocabulary for form, _ in _forms(name)}
    for phrase, word in NOT_AS_A_SYNONYM.items():
        add(phrase, own.get(word))
    for qualifier, noun in QUALIFIED:
        add(f"{qualifier} {noun}", known.get(noun))
    found.pop((), None)
    return found


def _forms(words: str) -> Iterable[tuple[str, bool]]:
    """Singular, plurals, and the singular of a name that is a plural ("skis")."""
    yield words, is_plural(words)
    if words.endswith("s") and not words.endswith("ss") and len(words) > 3:
        yield words[:-1], False
    for form in plurals(words):
        yield form, form != words


def key_of(name: str) -> str:
    """What two ways of writing a name have in common: "Cell-Phone" and "cell phone"."""
    return " ".join(_tokens(name)) or name.casefold()


def _tokens(words: str) -> tuple[str, ...]:
    return tuple(word.casefold() for word in WORD.findall(words))


def _reach(text: str, words: list[re.Match[str]], at: int, longest: int) -> int:
    """How many words from `at` on stand side by side, at most `longest`."""
    reach = 1
    while reach < min(longest, len(words) - at):
        between = text[words[at + reach - 1].end() : words[at + reach].start()]
        if not JOINT.fullmatch(between):
            break
        reach += 1
    return reach


@lru_cache(maxsize=64)
def _lexicon(vocabulary: tuple[str, ...]) -> Lexicon:
    return Lexicon(vocabulary)


def mentioned(text: str, vocabulary: Iterable[str]) -> frozenset[str]:
    """The object names, singular or plural, that a text says; see `Lexicon` for mentions."""
    return frozenset(_lexicon(tuple(vocabulary)).names(text))


@dataclass(frozen=True)
class Association:
    """AMBER's lists: words that a present object allows, and words that are never wrong.

    Wang et al., 2023, arXiv:2311.07397: `relation.json` and `safe_words.txt`.
    """

    related: Mapping[str, tuple[str, ...]]
    safe: frozenset[str] = frozenset()

    def words(self) -> tuple[str, ...]:
        """Every word that counts as a mention of an object."""
        parts = (word for name, others in self.related.items() for word in (name, *others))
        return tuple(dict.fromkeys(parts))

    def of(self, name: str) -> frozenset[str]:
        """The words that say `name`."""
        return frozenset((name, *self.related.get(name, ())))
