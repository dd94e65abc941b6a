"""Hallucinated captions made from true ones: an object, attribute, relation or number is swapped.

Kinds as in HACL (Jiang et al., CVPR 2024, arXiv:2312.06968), made by rule. A new object is one
that is absent and, in the captions or annotations at hand, often stands with the present ones:
what a language prior affirms, as in POPE's adversarial questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

from .mentions import Lexicon, Mention
from .negation import affirmed, denied_at
from .protocol import KINDS, Kind
from .words import counted, indefinite, plural

ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("red", "blue", "green", "yellow", "black", "white", "brown", "purple", "pink", "gray"),
    ("wooden", "metal", "plastic", "glass", "stone"),
    ("big", "small"),
    ("large", "little"),
    ("tall", "short"),
    ("young", "old"),
    ("open", "closed"),
    ("empty", "full"),
    ("clean", "dirty"),
    ("wet", "dry"),
    ("striped", "spotted", "plain"),
    ("round", "square"),
    ("sitting", "standing", "lying"),
    ("sunny", "rainy", "snowy"),
)
"""Words that exclude one another; one is swapped for another of its row."""
SPELLINGS = {"grey": "gray", "colour": "color"}
RELATIONS = {
    "to the left of": "to the right of",
    "on the left": "on the right",
    "left of": "right of",
    "on top of": "underneath",
    "in front of": "behind",
    "next to": "far away from",
    "close to": "far away from",
    "above": "below",
    "over": "under",
    "inside": "outside",
    "near": "far away from",
    "beside": "far away from",
    "with": "without",
}
"""Phrases and their opposites; those of which the opposite is in use are swapped both ways."""
_BOTH_WAYS = ("to the left of", "on the left", "left of", "in front of", "above", "over", "inside")
OPPOSITES = {**RELATIONS, **{RELATIONS[phrase]: phrase for phrase in _BOTH_WAYS}}
OPPOSITES["underneath"] = "on top of"
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""One is not a number here: "one of them", and swapping it would change the verb."""


@dataclass
class Altered:
    """Hallucinated captions, and how many captions of each kind could not be made."""

    captions: list[dict[Kind, str]] = field(default_factory=list)
    failed: Counter[Kind] = field(default_factory=Counter)

    def note(self, kinds: Sequence[Kind]) -> str:
        """One sentence on what could not be altered; "" where everything could."""
        total = len(self.captions)
        parts = [f"{kind} {self.failed[kind]}" for kind in kinds if self.failed[kind]]
        return f"of {total} captions, not altered by {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Altering:
    """Swaps one thing in a caption for one that is wrong of the picture."""

    lexicon: Lexicon
    together: Mapping[tuple[str, str], int]
    """In how many pictures two names, in alphabetical order, stand together."""
    seed: int = 0

    @classmethod
    def of(cls, lexicon: Lexicon, present: Iterable[Collection[str]], seed: int = 0) -> Altering:
        """With co-occurrence counted on the objects of some pictures."""
        return cls(lexicon, count_together(present), seed)

    def all(
        self,
        captions: Sequence[str],
        present: Sequence[Collection[str]],
        ids: Sequence[str] | None = None,
        kinds: Sequence[Kind] = KINDS,
    ) -> Altered:
        """Hallucinated captions of every kind that each caption allows.

        What is drawn depends on the seed and on a picture's id (its number, without ids) and not
        on the other pictures.
        """
        found = Altered()
        for i, (caption, names) in enumerate(zip(captions, present, strict=True)):
            lies: dict[Kind, str] = {}
            for kind in kinds:
                random = Random(f"{self.seed} {ids[i] if ids else i} {kind}")
                lie = self.one(caption, names, kind, random)
                if lie is None:
                    found.failed[kind] += 1
                else:
                    lies[kind] = lie
            found.captions.append(lies)
        return found

    def one(self, caption: str, present: Collection[str], kind: Kind, random: Random) -> str | None:
        """The caption made wrong in one way, or None where it holds nothing to swap."""
        mentions = self.lexicon.mentions(caption)
        there = affirmed(caption, mentions)
        if kind == "object":
            return self._object(caption, there, mentions, present, random)
        if kind == "attribute":
            return _attribute(caption, mentions, random)
        if kind == "relation":
            return _relation(caption, there, mentions, random)
        if kind == "count":
            return _count(caption, mentions, random)
        return None

    def _object(
        self,
        caption: str,
        there: Sequence[Mention],
        mentions: Sequence[Mention],
        present: Collection[str],
        random: Random,
    ) -> str | None:
        """One that the caption says is `there`, for one that no mention names."""
        named = list(dict.fromkeys(mention.name for mention in there))
        said = {mention.name for mention in mentions}
        absent = sorted(set(self.lexicon.vocabulary) - set(present) - said)
        if not named or not absent:
            return None
        old = random.choice(named)
        others = sorted((set(present) | set(named)) - {old})
        # + 1: without company every absent name is as plausible as the others.
        weights = [1 + 9 * self._company(name, others) for name in absent]
        new = random.choices(absent, weights)[0]
        swaps = [(m.start, m.end, plural(new) if m.plural else new) for m in there if m.name == old]
        return _swapped(caption, swaps)

    def _company(self, name: str, others: Iterable[str]) -> int:
        return sum(self.together.get(_pair(name, other), 0) for other in others)


def count_together(present: Iterable[Collection[str]]) -> dict[tuple[str, str], int]:
    """In how many pictures two names stand together, by the pair in alphabetical order."""
    counts: Counter[tuple[str, str]] = Counter()
    for names in present:
        counts.update(combinations(sorted(set(names)), 2))
    return dict(counts)


def caption_of(counts: Mapping[str, int]) -> str:
    """A caption where there is none, from the objects and how many there are of each."""
    if not counts:
        return ""
    parts = [_counted(name, number) for name, number in counts.items()]
    listed = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
    name, number = next(iter(counts.items()))
    verb = "is" if number == 1 and indefinite(name) != "some" else "are"
    return f"There {verb} {listed}."


def _counted(name: str, number: int) -> str:
    if number == 1:
        return f"{indefinite(name)} {name}"
    return counted(name, NUMBERS[number - 2] if number <= len(NUMBERS) + 1 else "many")


def _attribute(caption: str, mentions: Sequence[Mention], random: Random) -> str | None:
    rows = {word: row for row in ATTRIBUTES for word in row}
    found = [
        (match, rows[word])
        for match in _free_words(caption, mentions)
        if (word := SPELLINGS.get(match[0].lower(), match[0].lower())) in rows
    ]
    if not found:
        return None
    match, row = random.choice(found)
    said = {SPELLINGS.get(word, word) for word in re.findall(r"[a-z]+", caption.lower())}
    others = [word for word in row if word not in said]
    if not others:
        return None
    return _swapped(caption, [(match.start(), match.end(), random.choice(others))])


_PHRASE = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, OPPOSITES), key=len, reverse=True)) + r")\b(?!\s+no\b)",
    re.I,
)


_IS_OF = re.compile(r"(?:\s+(?!and\b|but\b|or\b)\w+){0,2}\s+")
"""Between a thing and where it is said to be: "no car parked near a dog"."""


def _relation(
    caption: str, there: Sequence[Mention], mentions: Sequence[Mention], random: Random
) -> str | None:
    absent = {mention.end for mention in mentions} - {mention.end for mention in there}
    found = [
        match
        for match in _PHRASE.finditer(caption)
        if _is_free(caption, match, mentions)
        and not any(_IS_OF.fullmatch(caption, end, match.start()) for end in absent)
    ]
    # "with" is everywhere and says little: only where there is nothing else.
    telling = [match for match in found if match[0].lower() != "with"] or found
    if not telling:
        return None
    match = random.choice(telling)
    return _swapped(caption, [(match.start(), match.end(), OPPOSITES[match[0].lower()])])


_NUMBER = re.compile(
    r"(?<!\d[.,:])\b(?:" + "|".join(NUMBERS) + r"|[2-9])\b(?![.,:]\d|\s*(?:o'clock|am\b|pm\b|%))",
    re.I,
)


def _count(caption: str, mentions: Sequence[Mention], random: Random) -> str | None:
    found = [m for m in _NUMBER.finditer(caption) if _is_free(caption, m, mentions)]
    if not found:
        return None
    match = random.choice(found)
    if match[0].isdigit():
        near = [str(n) for n in _near(int(match[0]), low=2, high=9)]
    else:
        near = [NUMBERS[n] for n in _near(NUMBERS.index(match[0].lower()), low=0, high=8)]
    return _swapped(caption, [(match.start(), match.end(), random.choice(near))])


def _near(number: int, *, low: int, high: int) -> list[int]:
    """Other numbers, at most two away."""
    return [n for n in range(max(low, number - 2), min(high, number + 2) + 1) if n != number]


def _free_words(caption: str, mentions: Sequence[Mention]) -> list[re.Match[str]]:
    return [m for m in re.finditer(r"[A-Za-z]+", caption) if _is_free(caption, m, mentions)]


def _is_free(caption: str, match: re.Match[str], mentions: Sequence[Mention]) -> bool:
    """Part of no mention, and not denied: "no blue car" may be as true as "no red car"."""
    inside = any(m.start < match.end() and match.start() < m.end for m in mentions)
    return not inside and not denied_at(caption, match.start(), mentions)


def _swapped(caption: str, swaps: Iterable[tuple[int, int, str]]) -> str:
    """Parts of the caption replaced; capitals and the article before are made to fit."""
    for start, end, word in sorted(swaps, reverse=True):
        before, old, after = caption[:start], caption[start:end], caption[end:]
        new = word[0].upper() + word[1:] if old[0].isupper() else word
        leading = re.search(r"\b(an?)(\s+)$", before, re.I)
        if leading:
            fit = indefinite(word)
            fit = fit.capitalize() if leading[1][0].isupper() else fit
            before = before[: leading.start()] + fit + leading[2]
        caption = before + new + after
    return caption


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)
