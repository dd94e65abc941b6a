"""A split with everything that is asked about it: questions, dialogues, captions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ..models.instructions import Rows, conversations, prompts, texts
from ..models.pictures import Pictures
from ..models.pretrain import dialogues
from ..models.template import Template
from ..models.tokenizer import Tokenizer
from ..sources.mentions import Association, Lexicon
from ..sources.pictures import PictureFiles
from ..sources.protocol import Corpus, Scene, Source
from .questions import STRATEGIES, Question, own_questions, questions


class PopeQuestions(NamedTuple):
    """Questions of one group, such as a POPE split."""

    rows: Rows
    questions: tuple[Question, ...]

    @property
    def scene(self) -> Int[Tensor, "question"]:
        return torch.tensor([question.scene for question in self.questions])


@dataclass(frozen=True)
class Captions:
    """Rows of each scene's caption and hallucinated ones, and which kinds the scene allows."""

    ids: Int[Tensor, "scene line token"]
    mask: Bool[Tensor, "scene line token"]
    present: Bool[Tensor, "scene kind"]
    line: Int[Tensor, "scene line"]
    """A number each text: lines that read the same have the same."""
    described: Bool[Tensor, "scene"]
    """Which scenes have a true caption; without one there is nothing to contrast."""

    def take(self, index: Int[Tensor, "batch"] | slice) -> dict[str, Tensor]:
        """Some scenes as a batch, cut to the longest line of them."""
        mask = self.mask[index]
        width = int(mask.sum(-1).max())
        return {
            "ids": self.ids[index, :, :width],
            "mask": mask[:, :, :width],
            "present": self.present[index],
        }


def captions(scenes: tuple[Scene, ...], source: Source, tokenizer: Tokenizer) -> Captions:
    """The true caption first, then one line a kind; the true one again where a kind is missing."""
    lines = [
        line
        for scene in scenes
        for line in (
            scene.caption,
            *(scene.hallucinated.get(k, scene.caption) for k in source.kinds),
        )
    ]
    rows = texts(lines, tokenizer)
    widths = rows.mask.sum(1).tolist()
    line = alike(tuple(ids[:n]) for ids, n in zip(rows.ids.tolist(), widths, strict=True))
    shape = (len(scenes), 1 + len(source.kinds))
    present = [[kind in scene.hallucinated for kind in source.kinds] for scene in scenes]
    return Captions(
        rows.ids.unflatten(0, shape),
        rows.mask.unflatten(0, shape),
        torch.tensor(present, dtype=torch.bool),
        line.unflatten(0, shape),
        torch.tensor([bool(scene.caption) for scene in scenes], dtype=torch.bool),
    )


def alike(values: Iterable[Hashable]) -> Int[Tensor, "value"]:
    """A number each value, from 0 in order of appearance: equal ones have the same."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


@dataclass(frozen=True)
class EvaluationSplit:
    """A split with everything that is asked about it."""

    scenes: tuple[Scene, ...]
    pictures: Pictures
    dialogues: Rows
    talked: Int[Tensor, "row"]
    """The scene of each dialogue: those of which nothing is said have none."""
    asked: Mapping[str, PopeQuestions]
    """By group, "pope_random" for example."""
    captions: Captions
    lexicon: Lexicon
    association: Association | None = None
    images: UInt8[Tensor, "scene 3 height width"] | PictureFiles | None = None
    """What a person sees of them."""

    @property
    def has_captions(self) -> bool:
        """Whether two pictures or more have a true caption, which the gap is measured with."""
        return len(self.described) > 1

    @property
    def described(self) -> Int[Tensor, "described"]:
        """The places of those pictures."""
        return self.captions.described.nonzero()[:, 0]


def evaluation_split(
    corpus: Corpus,
    pictures: Pictures,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    *,
    per_scene: int,
    cooccurrence: Tensor,
    generator: torch.Generator,
) -> EvaluationSplit:
    """Questions, dialogues for the task loss, and captions for the embeddings.

    Questions are those that come with the pictures; where there are none, POPE's three splits are
    made from the objects.
    """
    scenes = corpus.scenes
    groups = own_questions(scenes)
    if not groups:
        groups = {
            f"pope_{strategy}": questions(
                scenes,
                strategy=strategy,
                vocabulary=source.vocabulary,
                per_scene=per_scene,
                generator=generator,
                cooccurrence=cooccurrence,
            )
            for strategy in STRATEGIES
        }
    turns = dialogues(scenes, source, generator)
    talked = [i for i, conversation in enumerate(turns) if conversation]
    return EvaluationSplit(
        scenes,
        pictures,
        conversations([turns[i] for i in talked], tokenizer, template),
        torch.tensor(talked),
        {
            group: PopeQuestions(prompts([q.text for q in found], tokenizer, template), found)
            for group, found in groups.items()
            if found
        },
        captions(scenes, source, tokenizer),
        corpus.lexicon or Lexicon(source.vocabulary),
        corpus.association,
        corpus.images,
    )
