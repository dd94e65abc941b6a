"""Docstrings at the width of a terminal: paragraphs, lists, formulas and what is raised, each indented as it is meant."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace

ITEM = re.compile(r"(?:[-*]|\d+\.) +")
"""Begins an item of a list."""
GAP = re.compile(r" {3,}")
"""Between the formulas of a line."""


@dataclass(frozen=True)
class Block:
    """A paragraph, an item, a line that is set off, or an empty line; with what stands before its lines."""

    text: str
    first: str = ""
    rest: str = ""
    is_set_off: bool = False

    @property
    def is_item(self) -> bool:
        return bool(ITEM.fullmatch(self.first))


def wrapped(doc: str, width: int) -> list[str]:
    """The lines of a docstring at `width`; longer than that is only a word that is."""
    return [line for block in _blocks(doc) for line in _lines(block, width)]


def _blocks(doc: str) -> list[Block]:
    found: list[Block] = []
    in_raises = False
    for line in doc.splitlines():
        in_raises = line == "Raises:" or (in_raises and line.startswith(" "))
        before = found[-1] if found else Block("")
        if _goes_on(line, before, in_raises):
            found[-1] = replace(before, text=f"{before.text} {line.strip()}")
        else:
            found.append(_begun(line, before, in_raises))
    return found


def _goes_on(line: str, before: Block, in_raises: bool) -> bool:
    """Whether a line belongs to the block above it."""
    if not line or not before.text or _begins_item(line, before):
        return False
    if in_raises:
        return line.startswith(" " * 8)
    return not before.is_set_off and (before.is_item or not line.startswith(" "))


def _begun(line: str, before: Block, in_raises: bool) -> Block:
    if in_raises and line.startswith(" "):
        return Block(line.strip(), " " * 4, " " * 8, is_set_off=True)
    if _begins_item(line, before) and (mark := ITEM.match(line)):
        return Block(line[mark.end() :], mark[0], " " * mark.end())
    indent = line[: len(line) - len(line.lstrip())]
    if indent:
        return Block(line.strip(), indent, indent + " " * 4, is_set_off=True)
    return Block(line)


def _begins_item(line: str, before: Block) -> bool:
    """Not within a paragraph, where a line may happen to begin with a number or a sign."""
    return bool(ITEM.match(line)) and (not before.text or before.is_item or before.text[-1] == ":")


def _lines(block: Block, width: int) -> Iterator[str]:
    if not block.text:
        yield ""
        return
    is_wide = len(block.first) + len(block.text) > width
    for part in GAP.split(block.text) if block.is_set_off and is_wide else [block.text]:
        yield from textwrap.wrap(
            part,
            max(1, width),
            initial_indent=block.first,
            subsequent_indent=block.rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
