"""What a YAML text may cost: refused before anything is made of it, each with its line.

Tags would construct objects, another version of YAML reads the same text otherwise (1.1: `no` is
false), and aliases of aliases grow a few lines to gigabytes.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.scanner import RoundTripScanner

CHARACTERS = 200_000
"""In a recipe; the longest that is shipped has 7,000."""
VALUES = 5_000
"""Keys, values, lists and mappings, those that aliases repeat included."""
DEPTH = 50

_TOO_DEEP = f"more than {DEPTH} lists and mappings in one another"
_OTHER_VERSION = re.compile(r"^%YAML[ \t]+(?!1\.2\s).*$", re.MULTILINE)


def check(text: str) -> None:
    """Raise ruamel's `MarkedYAMLError`, with the place, for a text that a recipe has no use for."""
    if len(text) > CHARACTERS:
        _refuse(
            f"more than {CHARACTERS:,} characters; name a file of large data", _at(text, CHARACTERS)
        )
    if version := _OTHER_VERSION.search(text):
        _refuse(f"{version[0]}: recipes are YAML 1.2", _at(text, version.start()))
    sizes: dict[str, int] = {}
    begun: list[tuple[str | None, int]] = []
    total = 0
    yaml = YAML(typ="rt", pure=True)
    yaml.Scanner = _Scanner
    for event in yaml.parse(text):
        if isinstance(event, CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor:
                sizes[anchor] = total - before
        if not isinstance(event, NodeEvent):
            continue
        mark = event.start_mark
        if isinstance(event, AliasEvent):
            if any(event.anchor == anchor for anchor, _ in begun):
                _refuse(f"*{event.anchor} stands inside of what it repeats", mark)
            total += sizes.get(event.anchor, 1)
        else:
            total += 1
            if getattr(event, "tag", None):
                _refuse(
                    "a tag; a recipe is text, numbers, lists and mappings: take it out, and quote a "
                    "value that is text",
                    mark,
                )
        if isinstance(event, ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1
        if isinstance(event, CollectionStartEvent):
            begun.append((event.anchor, total - 1))
        if len(begun) > DEPTH:
            _refuse(_TOO_DEEP, mark)
        if total > VALUES:
            _refuse(f"more than {VALUES:,} values, with those that aliases repeat", mark)


class _Scanner(RoundTripScanner):
    """Counts open brackets as they are read: ruamel looks a thousand characters ahead of its events."""

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:
        super().fetch_flow_collection_start(TokenClass, to_push)
        if len(self.flow_context) > DEPTH:
            _refuse(_TOO_DEEP, self.reader.get_mark())


def _at(text: str, index: int) -> StringMark:
    return StringMark("", index, text.count("\n", 0, index), 0, None, 0)


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise MarkedYAMLError(problem=problem, problem_mark=mark)
