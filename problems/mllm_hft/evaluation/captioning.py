"""Measures of generated captions: CHAIR with coverage, and AMBER's generative part.

CHAIR: Rohrbach et al., EMNLP 2018, arXiv:1809.02156. AMBER: Wang et al., 2023, arXiv:2311.07397.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from bilevel.errors import ProblemError

from ..sources.mentions import Association
from .answers import Metrics, share

Row = dict[str, Any]
"""One picture or question with all that was measured of it; plain data, for JSON lines."""


def chair(mentioned: Sequence[Collection[str]], present: Sequence[Collection[str]]) -> Metrics:
    """Objects named by captions against objects in the pictures.

    `mentioned` holds a name a mention, as `Lexicon.names` gives them; in a set each counts once.
    CHAIR_i = mentions of absent objects / mentions; CHAIR_s = captions with one / captions;
    coverage = objects named and present / present. CHAIR falls when a caption says less: read it
    beside coverage and `without_object`. A fraction 0 / 0 is 0.
    """
    rows = chair_rows(mentioned, present)
    named = sum(row["mentions"] for row in rows)
    return {
        "chair_i": share(sum(len(row["absent"]) for row in rows), named),
        "chair_s": share(sum(bool(row["absent"]) for row in rows), len(rows)),
        "coverage": share(
            sum(len(row["covered"]) for row in rows), sum(len(set(there)) for there in present)
        ),
    }


def without_object(mentioned: Sequence[Collection[str]]) -> float:
    """Share of captions that name no known object: CHAIR says nothing of them."""
    return share(sum(not said for said in mentioned), len(mentioned))


def chair_rows(
    mentioned: Sequence[Collection[str]], present: Sequence[Collection[str]]
) -> list[Row]:
    """Of each caption: mentions, those of absent objects, and the present objects it names."""
    _refuse_other_lengths("chair", mentioned, present)
    rows = []
    for said, there in zip(mentioned, present, strict=True):
        known = set(there)
        rows.append(
            {
                "mentions": len(said),
                "absent": sorted(name for name in said if name not in known),
                "covered": sorted(known & set(said)),
                "present": sorted(known),
            }
        )
    return rows


def amber_generative(
    mentioned: Sequence[Collection[str]],
    truth: Sequence[Collection[str]],
    lures: Sequence[Collection[str]],
    association: Association,
) -> Metrics:
    """AMBER's CHAIR, Cover, Hal and Cog of captions, as shares and not in per cent.

    `mentioned`: the words of `association.words()` in each caption, mention by mention. A word is
    right where it says an object of `truth` (itself or an associated word) or is a safe word.

    chair = wrong mentions / mentions; cover = objects of truth said / objects of truth;
    hal = captions with a wrong mention / captions; cog = lures said / lures, as the released
    script counts, and cog_of_mentions = mentions that say a lure / mentions, as the paper writes.
    It differs from the released script in that words match exactly: no word vectors, by which a
    word near to another counts as it. A fraction 0 / 0 is 0.
    """
    _refuse_other_lengths("amber", mentioned, truth)
    _refuse_other_lengths("amber", mentioned, lures)
    rows = [
        amber_row(said, there, expected, association)
        for said, there, expected in zip(mentioned, truth, lures, strict=True)
    ]
    mentions = sum(row["mentions"] for row in rows)
    return {
        "chair": share(sum(len(row["absent"]) for row in rows), mentions),
        "cover": share(sum(len(r["covered"]) for r in rows), sum(len(set(t)) for t in truth)),
        "hal": share(sum(bool(row["absent"]) for row in rows), len(rows)),
        "cog": share(sum(len(r["lured"]) for r in rows), sum(len(set(t)) for t in lures)),
        "cog_of_mentions": share(sum(row["lured_mentions"] for row in rows), mentions),
    }


def amber_row(
    said: Collection[str], truth: Collection[str], lures: Collection[str], association: Association
) -> Row:
    """Of one caption: mentions, the wrong ones, the objects and the lures that it says."""
    right = frozenset(word for name in truth for word in association.of(name))
    lure = frozenset(word for name in lures for word in association.of(name)) - right
    judged = [word for word in said if word not in association.safe]
    return {
        "mentions": len(said),
        "absent": sorted(word for word in judged if word not in right),
        "covered": sorted(n for n in set(truth) if association.of(n) & set(judged)),
        "lured": sorted(n for n in set(lures) if association.of(n) & lure & set(judged)),
        "lured_mentions": sum(word in lure for word in judged),
    }


def amber_score(chair: float, f1: float) -> float:
    """(1 − CHAIR + F1) / 2: AMBER's one number, from the generative and discriminative parts."""
    return (1 - chair + f1) / 2


def _refuse_other_lengths(measure: str, said: Sequence[Any], there: Sequence[Any]) -> None:
    if len(said) != len(there):
        raise ProblemError(f"{measure}: {len(said)} captions for {len(there)} pictures")
