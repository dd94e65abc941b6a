"""Pictures with what models say of them, words for objects that are not there marked."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unicodedata import combining

from torch import Tensor

from ..sources.mentions import Lexicon

COLUMNS = 2
WIDTH = 46
"""Characters in a line."""
LINES = 5
"""Lines that each model has room for, its title among them; what is longer ends in "…"."""
FONT = 8.0
"""Size of the text in points; a character of the font is 0.602 as wide."""
HIGH = 1.3 * FONT
"""Of a line, in points."""
RED, GREEN, GREY = "#c62828", "#2e7d32", "0.45"
BOX = {"facecolor": "#fde0e0", "edgecolor": RED, "linewidth": 0.7, "pad": 0.9}
"""Around what is not there, as red alone is lost in grey print."""


@dataclass(frozen=True)
class Described:
    """A picture, the names of what is there, and what each model says of it, by the model's title."""

    picture: Tensor
    there: Collection[str]
    said: Mapping[str, str]


class Word(NamedTuple):
    """A stretch of a line that is written in one way, and the column it begins at."""

    column: int
    text: str
    right: bool | None
    """Whether the object it names is there; None where it names none."""


def lines(text: str, there: Collection[str], lexicon: Lexicon) -> Iterator[list[Word]]:
    """The text in lines of at most `WIDTH` characters, split where a mention begins and ends.

    A mention that is broken over two lines is marked in both.
    """
    text = " ".join(text.split())
    right = {
        at: mention.name in there
        for mention in lexicon.mentions(text)
        for at in range(mention.start, mention.end)
    }
    if not text:
        yield [Word(0, "(nothing)", None)]
    at = 0
    for line in textwrap.wrap(text, WIDTH):
        at += text[at] == " "  # a line ends at a space, or in a word that is longer than a line
        words: list[Word] = []
        for column, character in enumerate(line):
            is_right = right.get(at + column)
            if words and words[-1].right == is_right:
                words[-1] = words[-1]._replace(text=words[-1].text + character)
            else:
                words.append(Word(column, character, is_right))
        at += len(line)
        yield words


def captions_figure(described: Sequence[Described], lexicon: Lexicon, footnote: str) -> Any:
    """A `matplotlib.figure.Figure`: each picture with each model's caption beside it."""
    from matplotlib.figure import Figure

    rows = -(-len(described) // COLUMNS)
    models = max(2, *(len(one.said) for one in described))
    tall = HIGH / 72 * LINES * models + 0.2
    figure = Figure(figsize=(5.4 * COLUMNS, tall * rows + 0.7))
    top, bottom = 1 - 0.4 / figure.get_figheight(), 0.3 / figure.get_figheight()
    height = (top - bottom) / rows
    for i, one in enumerate(described):
        row, column = divmod(i, COLUMNS)
        base = top - (row + 1) * height
        left = column / COLUMNS + 0.01
        picture = figure.add_axes((left, base + 0.05 * height, 0.13, 0.9 * height))
        picture.imshow(one.picture.permute(1, 2, 0).numpy())
        picture.set_axis_off()
        picture.set_anchor("N")
        text = figure.add_axes((left + 0.14, base, 1 / COLUMNS - 0.16, 0.95 * height))
        text.set_axis_off()
        _write(text, one, lexicon)
    head = 1 - 0.27 / figure.get_figheight()
    figure.text(0.37, head, "object that is there", ha="center", color=GREEN, fontsize=9)
    figure.text(0.63, head, "hallucinated: it is not", ha="center", color=RED, fontsize=9, bbox=BOX)
    figure.text(0.5, 0.08 / figure.get_figheight(), footnote, ha="center", fontsize=8, color=GREY)
    return figure


def _write(axis: Any, one: Described, lexicon: Lexicon) -> None:
    line = 0
    for title, caption in one.said.items():
        _say(axis, line, Word(0, title, None), GREY, style="italic")
        line += 1
        room, found = LINES - 1, list(lines(caption, one.there, lexicon))
        if len(found) > room:
            found = [*found[: room - 1], [Word(0, "…", None)]]
        for words in found:
            for word in words:
                colour = {None: "black", True: GREEN, False: RED}[word.right]
                _say(axis, line, word, colour)
            line += 1


def drawable(text: str) -> str:
    """The text with � for each character that the font has no glyph for, or that joins with another."""
    known = _glyphs()
    return "".join(
        c if ord(c) in known and not combining(c) else "\N{REPLACEMENT CHARACTER}" for c in text
    )


@cache
def _glyphs() -> frozenset[int]:
    """Characters of the monospaced font in every style that is used."""
    from matplotlib import font_manager as fonts

    mono = fonts.FontProperties(family="monospace")
    bold = fonts.FontProperties(family="monospace", weight="bold")
    italic = fonts.FontProperties(family="monospace", style="italic")
    found = map(fonts.findfont, (mono, bold, italic))
    return frozenset.intersection(*(frozenset(fonts.get_font(f).get_charmap()) for f in found))


def _say(axis: Any, line: int, word: Word, colour: str, style: str = "normal") -> None:
    wide = 0.602 * FONT
    axis.annotate(
        drawable(word.text),
        (0, 1),
        (word.column * wide, -(line + 1) * HIGH),
        xycoords="axes fraction",
        textcoords="offset points",
        fontfamily="monospace",
        fontsize=FONT,
        fontweight="normal" if word.right is None else "bold",
        fontstyle=style,
        color=colour,
        bbox=BOX if word.right is False else None,
        annotation_clip=False,
        parse_math=False,  # a caption with two dollar signs is no formula
    )
