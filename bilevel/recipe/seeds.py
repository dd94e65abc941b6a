"""Seeds as people write them: `3`, `0,2,5`, `0..4` (both ends), a list, or a mixture."""

from __future__ import annotations

import re
from typing import Any

from bilevel.errors import RecipeError
from bilevel.recipe.yaml_source import Source

MOST_SEEDS = 1000
EXPECTED = "must be like 3, 0,2,5 or 0..4"


def parse_seeds(text: str, title: str | None = None) -> tuple[int, ...]:
    """The seeds in a text, without repetition; raises `RecipeError` that begins with `title`."""
    title = f"--seeds {text!r}" if title is None else title
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", part.strip())
        if not match:
            raise RecipeError(f"{title}: {EXPECTED}; got {part!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"{title}: {part.strip()} is empty; the smaller end first")
        if len(found) + last - first >= MOST_SEEDS:
            raise RecipeError(f"{title}: more than {MOST_SEEDS:,} of them")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def seeds_of(value: Any) -> tuple[int, ...]:
    """The seeds that a recipe's `seeds` stands for; raises `ValueError` with what was expected."""
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(type(part) in (int, str) for part in parts):
        raise ValueError(f"{EXPECTED}, or a list of these")
    try:
        return parse_seeds(",".join(map(str, parts)), title="")
    except RecipeError as error:
        raise ValueError(str(error).removeprefix(": ")) from None


def settled(source: Source) -> Source:
    """A source of which `seed` or `seeds`, as an override has it, takes the place of the other."""
    pair = ("seed", "seeds")
    if not source.data.keys() >= set(pair):
        return source
    given = [key for key in pair if not source.is_overridden((key,))]
    if len(given) != 1:
        return source
    return Source(
        source.title,
        {key: value for key, value in source.data.items() if key not in given},
        source.origins,
    )
