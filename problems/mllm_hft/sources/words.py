"""English nouns: plurals, regular and not, and articles."""

from __future__ import annotations

import re

_IRREGULAR: dict[str, tuple[str, ...]] = {
    "person": ("people", "persons"),
    "man": ("men",),
    "child": ("children",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "goose": ("geese",),
    "mouse": ("mice",),
    "ox": ("oxen",),
    "die": ("dice",),
    "leaf": ("leaves",),
    "loaf": ("loaves",),
    "calf": ("calves",),
    "half": ("halves",),
    "wolf": ("wolves",),
    "elf": ("elves",),
    "shelf": ("shelves",),
    "thief": ("thieves",),
    "knife": ("knives",),
    "wife": ("wives",),
    "life": ("lives",),
    "scarf": ("scarves", "scarfs"),
    "hoof": ("hooves", "hoofs"),
    "cactus": ("cacti", "cactuses"),
    "fish": ("fish", "fishes"),
    **{name: (name,) for name in ("sheep", "deer", "moose", "bison", "aircraft", "shrimp")},
    **{name: (f"{name}s",) for name in ("photo", "piano", "logo", "avocado", "burrito", "taco")},
}
_ENDINGS = ("man", "child", "person", "wife", "knife", "shelf", "fish")
"""Compounds that end so take the same plural: firemen, grandchildren, goldfish."""
_REGULAR_MEN = ("human", "german", "roman", "ottoman", "shaman", "talisman", "caiman")
_VOWELS = "aeiou"
_SINGULAR = frozenset((
    "atlas", "bias", "canvas", "christmas", "gas", "lens", "madras", "pampas", "asbestos",
    "chaos", "cosmos", "rhinoceros", "thermos", "series", "species",
))  # fmt: skip
"""Words in -s that are one thing; so are those in -ss, and in -is and -us but for `_FOREIGN`."""
_FOREIGN = frozenset((
    "alibi", "bikini", "emu", "gnu", "kiwi", "martini", "menu", "safari", "ski", "taxi", "tutu",
    "zucchini",
))  # fmt: skip
"""Words in -i and -u that an s makes plural."""
_PAIRS = frozenset((
    "binoculars", "chopsticks", "cymbals", "earphones", "earrings", "eyeglasses", "goggles",
    "headphones", "jeans", "leggings", "mittens", "overalls", "pajamas", "pants", "pliers",
    "pyjamas", "scissors", "shorts", "skis", "sneakers", "socks", "spectacles", "stockings",
    "sunglasses", "tongs", "trousers", "tweezers",
))  # fmt: skip
"""Things that come as "a pair of …"."""
_MANY = frozenset(form for forms in _IRREGULAR.values() for form in forms) - {*_IRREGULAR}
_AN = re.compile(r"hour|honest|hono|heir|suv\b|lcd\b|led\b|mri\b|x[- ]?ray")
_A = re.compile(r"eu|ewe|once\b|one\b|u(?:ni(?![dmnr])|s[aeu]|t[eio]|rin|ra|ku|biq)")
_SPELLED = re.compile(r"[A-Z]{2,3}\b")
"""Letters that are read one by one: "an MP", "a TV"."""


def is_plural(name: str) -> bool:
    """Whether a name already is a plural: "skis", "people", "wine glasses"; not "bus" or "sheep"."""
    word = name.casefold().rpartition(" ")[2]
    if word in _MANY or word in _PAIRS:
        return True
    if not word.endswith("s") or len(word) < 4 or word.endswith("ss") or word in _SINGULAR:
        return False
    return not word.endswith(("is", "us")) or word[:-1] in _FOREIGN


def plural(name: str) -> str:
    """The plural of an object's name; of several words, the last is changed. A plural stays."""
    return plurals(name)[0]


def plurals(name: str) -> tuple[str, ...]:
    """Every plural that a text may have, the usual one first."""
    head, space, last = name.rpartition(" ")
    return tuple(head + space + form for form in _plurals_of_word(last))


def _plurals_of_word(word: str) -> tuple[str, ...]:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if is_plural(word):
        return (word,)
    for ending in _ENDINGS:
        if word.endswith(ending) and word not in _REGULAR_MEN:
            stem = word.removesuffix(ending)
            return tuple(stem + form for form in _IRREGULAR[ending])
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        return (f"{word[:-1]}ies",)
    if word.endswith("o") and word[-2:-1] not in _VOWELS:
        return f"{word}es", f"{word}s"
    if word.endswith("f") and not word.endswith("ff"):
        return f"{word}s", f"{word[:-1]}ves"
    return (f"{word}s",)


def article(name: str) -> str:
    """ "a" or "an", by how the word is spoken: "an hour", "a uniform", "an SUV"."""
    if _SPELLED.match(name):
        return "an" if name[0] in "AEFHILMNORSX" else "a"
    word = name.casefold()
    if _AN.match(word):
        return "an"
    return "a" if _A.match(word) or word[0] not in _VOWELS else "an"


def indefinite(name: str) -> str:
    """What stands before a name that was not spoken of: "an" of "apple", "a pair of" of "skis"."""
    if not is_plural(name):
        return article(name)
    return "a pair of" if name.casefold().rpartition(" ")[2] in _PAIRS else "some"


def counted(name: str, number: str) -> str:
    """More than one: "two dogs", "two pairs of skis"."""
    return (
        f"{number} pairs of {name}"
        if indefinite(name) == "a pair of"
        else f"{number} {plural(name)}"
    )
