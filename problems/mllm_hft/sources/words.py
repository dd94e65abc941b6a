"""English nouns: plurals, regular and not, and articles."""

from __future__ import annotations

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


def plural(name: str) -> str:
    """The plural of an object's name; of several words, the last is changed."""
    return plurals(name)[0]


def plurals(name: str) -> tuple[str, ...]:
    """Every plural that a text may have, the usual one first."""
    head, space, last = name.rpartition(" ")
    return tuple(head + space + form for form in _plurals_of_word(last))


def _plurals_of_word(word: str) -> tuple[str, ...]:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
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
    """ "a" or "an"."""
    return "an" if name[0].lower() in _VOWELS else "a"
