"""Yes/no questions about scenes. POPE: Li et al. (2023), arXiv:2305.10355.

A question polls whether an object is in the picture. Yes and no are balanced, and the strategy
says which absent objects are asked about: any (random), the most frequent (popular), or those that
most often stand with the present ones (adversarial), which a language prior affirms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from bilevel.errors import ProblemError

from ..sources import language
from ..sources.protocol import Scene

Strategy = Literal["random", "popular", "adversarial"]
STRATEGIES: tuple[Strategy, ...] = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """A question about scene number `scene`, its true answer, and the object it asks about."""

    scene: int
    text: str
    answer: bool
    name: str


def cooccurrence(
    scenes: Iterable[Scene], vocabulary: Sequence[str]
) -> Float[Tensor, "present absent"]:
    """In how many scenes two names stand together; the diagonal counts each name alone."""
    place = {name: index for index, name in enumerate(vocabulary)}
    rows = [[place[name] for name in scene.names] for scene in scenes]
    present = torch.zeros(len(rows), len(vocabulary))
    for row, columns in zip(present, rows, strict=True):
        row[columns] = 1.0
    return present.T @ present


def questions(
    scenes: Sequence[Scene],
    *,
    strategy: Strategy,
    vocabulary: Sequence[str],
    per_scene: int,
    generator: Generator,
    cooccurrence: Float[Tensor, "present absent"] | None = None,
) -> tuple[Question, ...]:
    """Up to `per_scene` questions a scene, exactly as many answered yes as no.

    None about a scene of which it is not known what is absent. A scene with fewer present (or absent) names than `per_scene / 2` gets fewer of both.
    `vocabulary` is ordered, most frequent first, and this order is what "popular" means and what
    breaks ties. `cooccurrence` is counted on training scenes, in the order of `vocabulary`, and
    needed by "adversarial" alone. Raises `ProblemError` where it is missing or of another size,
    and for an odd or non-positive `per_scene`.
    """
    _check(strategy, vocabulary, per_scene, cooccurrence)
    random = _random(generator)
    asked = []
    for index, scene in enumerate(scenes):
        if not scene.annotated:
            continue
        present = [name for name in vocabulary if name in scene.names]
        absent = [name for name in vocabulary if name not in scene.names]
        half = min(per_scene // 2, len(present), len(absent))
        if strategy == "random":
            wrong = random.sample(absent, half)
        elif strategy == "popular" or cooccurrence is None:
            wrong = absent[:half]
        else:
            wrong = _expected(present, absent, vocabulary, cooccurrence)[:half]
        for right, lie in zip(random.sample(present, half), wrong, strict=True):
            asked.append(Question(index, language.question(scene, right), True, right))
            asked.append(Question(index, language.question(scene, lie), False, lie))
    return tuple(asked)


def own_questions(scenes: Sequence[Scene]) -> dict[str, tuple[Question, ...]]:
    """The questions that come with scenes, by group."""
    found: dict[str, list[Question]] = {}
    for index, scene in enumerate(scenes):
        for own in scene.questions:
            question = Question(index, own.text, own.answer, own.name or own.text)
            found.setdefault(own.group, []).append(question)
    return {group: tuple(asked) for group, asked in found.items()}


def _expected(
    present: list[str], absent: list[str], vocabulary: Sequence[str], together: Tensor
) -> list[str]:
    """Absent names, those first that stood with the present ones most often."""
    place = {name: index for index, name in enumerate(vocabulary)}
    score = together[[place[name] for name in present]].sum(0)
    return sorted(absent, key=lambda name: -float(score[place[name]]))


def _random(generator: Generator) -> Random:
    return Random(int(torch.randint(2**62, (1,), generator=generator)))


def _check_number(per_scene: int) -> None:
    if per_scene < 2 or per_scene % 2:
        raise ProblemError(
            f"per_scene = {per_scene}; must be even and at least 2: half is answered yes, half no"
        )


def _check(
    strategy: Strategy, vocabulary: Sequence[str], per_scene: int, together: Tensor | None
) -> None:
    _check_number(per_scene)
    if strategy not in STRATEGIES:
        raise ProblemError(f"strategy = {strategy!r}; must be one of {', '.join(STRATEGIES)}")
    if strategy != "adversarial":
        return
    expected = (len(vocabulary), len(vocabulary))
    got = None if together is None else tuple(together.shape)
    if got != expected:
        raise ProblemError(
            f"adversarial questions need cooccurrence of shape {expected}, got {got}; count it "
            "with `cooccurrence(training_scenes, vocabulary)`"
        )
