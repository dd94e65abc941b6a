"""Which objects a caption denies: "no car in sight" tells that there is no car.

Simple negations alone: what stands right after "no", "without", "free of", "lacking" and the like, or
after "not" or "n't" with "a", "any" or "one". The noun phrase that begins there is denied, and what
"or" and "nor" join to it: "no cats, dogs or birds". What follows its first object is not: "a man with no
helmet on a motorcycle" and "a room with no people and a dog" tell of a motorcycle and of a dog.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .mentions import Mention

_ANY = r"(?:(?:an?|any|one|even|single|sign|signs|trace|view|of)\s+)*"
_DOING = r"(?:(?:having|wearing|holding|carrying|using|showing|seeing|including)\s+)?"
_DENIAL = re.compile(
    rf"""
    \b(?:
        no\s+(?!one\b|longer\b|doubt\b|matter\b|way\b){_ANY}
      | (?:without|neither|nor|lacking|lacks|(?:free|devoid|empty)\s+of
          |(?:absence|lack)\s+of)\s+{_DOING}(?:the\s+|its\s+|his\s+|her\s+|their\s+)?{_ANY}
      | (?:not|cannot|\w+n['\u2019]t)\s+(?:(?!only|just|merely|simply|sure)[^\W\d_]+\s+){{0,2}}?
          (?:an?|any|one|even\s+an?)\s+{_ANY}
    )
    (?P<between>(?:[^\W\d_]+[\s\-]+){{0,3}}?)\Z
    """,
    re.I | re.X,
)
"""A negation up to the end of a text, with the words of the noun phrase that stand between."""
_NEGATIVE = re.compile(
    r"\b(?:no|not|nor|neither|cannot|without|lack\w*|absence|free|devoid|empty)\b|n['\u2019]t\b",
    re.I,
)
"""What every denial holds: few captions do."""
_ENDS_PHRASE = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "my",
    "your", "our", "some", "one", "two", "three", "four", "five", "and", "but", "except",
    "besides", "only", "just", "with", "without", "in", "on", "at", "by", "of", "to", "from",
    "for", "near", "behind", "beside", "under", "over", "above", "below", "between", "inside",
    "outside", "next", "off", "up", "down", "into", "onto", "around", "through", "is", "are",
    "was", "were", "be", "been", "has", "have", "had", "do", "does", "did", "can", "could",
    "will", "would", "while", "as", "if", "when", "who", "which", "where", "not", "no", "than",
    "like",
))  # fmt: skip
_OR = re.compile(r",?\s+n?or\s+(?:an?\s+|any\s+|other\s+|even\s+)*(?:[^\W\d_]+\s+)?", re.I)
_COMMA = re.compile(r",\s+(?:an?\s+|any\s+)?", re.I)


def affirmed(text: str, mentions: Sequence[Mention]) -> tuple[Mention, ...]:
    """The mentions, in reading order, that no negation denies."""
    if not _NEGATIVE.search(text):
        return tuple(mentions)
    is_denied = [denied_at(text, mention.start, mentions) for mention in mentions]
    waiting: list[int] = []
    for i in range(1, len(mentions)):
        between = text[mentions[i - 1].end : mentions[i].start]
        follows = is_denied[i - 1] or (i - 1) in waiting
        if follows and _OR.fullmatch(between):
            for place in (*waiting, i):
                is_denied[place] = True
            waiting = []
        elif follows and not is_denied[i] and _COMMA.fullmatch(between):
            waiting.append(i)  # denied if the list ends in "or"
        else:
            waiting = []
    return tuple(m for m, denied in zip(mentions, is_denied, strict=True) if not denied)


def denied_at(text: str, place: int, mentions: Sequence[Mention]) -> bool:
    """Whether what begins at `place` belongs to a denied noun phrase, by what stands before it."""
    if not _NEGATIVE.search(text, 0, place):
        return False
    begin = max((mention.end for mention in mentions if mention.end <= place), default=0)
    found = _DENIAL.search(text, begin, place)
    if found is None:
        return False
    between = found["between"].lower().replace("-", " ").split()
    is_verb = any(word.endswith("ing") for word in between[1:])  # "no helmet riding …"
    return not is_verb and _ENDS_PHRASE.isdisjoint(between)
