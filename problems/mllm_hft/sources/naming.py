"""What records name: the objects they list and those that their captions affirm, in one lexicon.

A listed object is read as a caption is: by other words, and whatever its case and number. An object
that a reference caption denies ("no car in sight") is not named by it; in a model's caption every
mention counts, as in CHAIR.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from . import coco_objects
from .altering import Altering
from .mentions import Lexicon, Mention, key_of
from .negation import affirmed
from .words import plurals

if TYPE_CHECKING:
    from .files import Record


@dataclass(frozen=True)
class Naming:
    """Records read with a lexicon."""

    records: Sequence[Record]
    lexicon: Lexicon
    seed: int
    """Of the hallucinated captions."""

    @cached_property
    def _names(self) -> dict[str, frozenset[str]]:
        return {record.id: self._read(record) for record in self.records}

    def of(self, record: Record) -> frozenset[str]:
        """As CHAIR has it: what is annotated and what the reference captions name."""
        return self._names[record.id]

    def _read(self, record: Record) -> frozenset[str]:
        listed = map(self.lexicon.name_of, record.objects)
        said = (m.name for caption in record.captions for m in self._affirmed(caption))
        return frozenset((*listed, *said))

    def _affirmed(self, caption: str) -> tuple[Mention, ...]:
        return affirmed(caption, self.lexicon.mentions(caption))

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every name, the most frequent in the records first, then as the lexicon has them."""
        counts = Counter(name for names in self._names.values() for name in names)
        known = self.lexicon.vocabulary
        order = {name: place for place, name in enumerate((*known, *sorted({*counts} - {*known})))}
        return tuple(sorted(order, key=lambda name: (-counts[name], order[name])))

    @cached_property
    def altering(self) -> Altering:
        return Altering.of(self.lexicon, self._names.values(), self.seed)


def listed_by(records: Iterable[Record]) -> tuple[str, ...]:
    """Names that records list, the most frequent first."""
    counts = Counter(name for record in records for name in record.objects)
    return distinct(sorted(counts, key=lambda name: (-counts[name], name)))


def lexicon_of(listed: Sequence[str]) -> Lexicon:
    """Listed names, with COCO's words for those it knows; COCO's classes where nothing is listed."""
    names = tuple(listed) or coco_objects.NAMES
    return Lexicon(names, {n: w for n, w in coco_objects.SYNONYMS.items() if n in names})


def with_names(lexicon: Lexicon, listed: Iterable[str]) -> Lexicon:
    """A lexicon that also knows the listed names which it has no word for."""
    more = [name for name in listed if not lexicon.knows(name)]
    return Lexicon((*lexicon.vocabulary, *more), lexicon.synonyms)


def united(lexicons: Sequence[Lexicon]) -> Lexicon:
    """The names of several lexicons with their other words.

    A name of one that is another word for a name of another is that name, and gives it its words.
    """
    names = distinct(name for lexicon in lexicons for name in lexicon.vocabulary)
    plain, stands_for = Lexicon(names), dict[str, str]()

    def root(name: str) -> str:
        while stands_for.get(name, name) != name:
            name = stands_for[name]
        return name

    for name in names:
        said = (plain.name_of(words.name_of(name)) for words in lexicons if words.knows(name))
        stands_for[name] = root(next((other for other in said if other != name), name))
    kept = tuple(name for name in names if root(name) == name)
    words: dict[str, dict[str, None]] = {name: {} for name in kept}
    for lexicon in lexicons:
        for name, others in lexicon.synonyms.items():
            words[root(plain.name_of(name))] |= dict.fromkeys(others)
    for name in names:
        if (own := root(name)) != name:
            words[own] |= {name: None}
    return Lexicon(kept, {name: tuple(others) for name, others in words.items() if others})


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Names that differ in more than case and number: "Dogs" beside "dog" is the dog.

    Lower case where some spelling is, or where COCO has the word.
    """
    spelled: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        spelled[key] = name if name == key else spelled.get(key, name)
    singular = {
        form: one for one in (*spelled, *sorted(_COCO)) for form in plurals(one) if form != one
    }
    found = (key if key in _COCO else singular.get(key, key) for key in spelled)
    return tuple(dict.fromkeys(one if one in _COCO else spelled.get(one, one) for one in found))


_COCO = frozenset(
    word for name, words in coco_objects.SYNONYMS.items() for word in (name, *words)
)  # fmt: skip
