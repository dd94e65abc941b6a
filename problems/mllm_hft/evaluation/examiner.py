"""The evaluated split, and every measure of a model on it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.events import Progress
from bilevel.types import Params

from ..formulations import split, task
from ..models.instructions import (
    Rows,
    conversations,
    prompt_ids,
    prompts,
    texts,
)
from ..models.network import Network, call, chunks
from ..models.pictures import Pictures
from ..models.pretrain import answer_scores, answer_words, dialogues
from ..models.template import Template
from ..models.tokenizer import Tokenizer, until_end
from ..sources.language import DESCRIBE
from ..sources.mentions import Lexicon
from ..sources.protocol import Scene, Source
from .measures import Metrics, blind, chair, gap, pope, without_object
from .questions import STRATEGIES, questions

CHUNK = 128
CAPTION_TOKENS = 48


class Asked(NamedTuple):
    """Questions of one POPE split."""

    rows: Rows
    scene: Int[Tensor, "question"]
    answers: Bool[Tensor, "question"]
    names: tuple[str, ...]
    """What each asks about."""


class Embeddings(NamedTuple):
    """Pictures, true captions and hallucinated captions through the heads, on CPU."""

    image: Float[Tensor, "scene embedding"]
    text: Float[Tensor, "scene embedding"]
    hallucinated: Float[Tensor, "scene kind embedding"]


@dataclass(frozen=True)
class Captions:
    """Rows of each scene's caption and hallucinated ones, and which kinds the scene allows."""

    ids: Int[Tensor, "scene line token"]
    mask: Bool[Tensor, "scene line token"]
    present: Bool[Tensor, "scene kind"]

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
    shape = (len(scenes), 1 + len(source.kinds))
    present = [[kind in scene.hallucinated for kind in source.kinds] for scene in scenes]
    return Captions(
        rows.ids.unflatten(0, shape), rows.mask.unflatten(0, shape), torch.tensor(present)
    )


@dataclass(frozen=True)
class Exam:
    """A split with everything that is asked about it."""

    scenes: tuple[Scene, ...]
    pictures: Pictures
    dialogues: Rows
    asked: Mapping[str, Asked]
    captions: Captions


def make_exam(
    scenes: tuple[Scene, ...],
    pictures: Pictures,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    *,
    per_scene: int,
    cooccurrence: Tensor,
    generator: torch.Generator,
) -> Exam:
    """POPE's three splits, dialogues for the task loss, and captions for the embeddings."""
    asked = {}
    for strategy in STRATEGIES:
        found = questions(
            scenes,
            strategy=strategy,
            vocabulary=source.vocabulary,
            per_scene=per_scene,
            generator=generator,
            cooccurrence=cooccurrence,
        )
        asked[strategy] = Asked(
            prompts([question.text for question in found], tokenizer, template),
            torch.tensor([question.scene for question in found]),
            torch.tensor([question.answer for question in found]),
            tuple(question.name for question in found),
        )
    turns = dialogues(scenes, source, generator)
    return Exam(
        scenes,
        pictures,
        conversations(turns, tokenizer, template),
        asked,
        captions(scenes, source, tokenizer),
    )


@dataclass(frozen=True)
class Examiner:
    """Runs a model over an exam; batches go where the model is."""

    network: Network
    tokenizer: Tokenizer
    template: Template
    vocabulary: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def measure(self, parameters: Params, exam: Exam) -> Generator[Progress, None, Metrics]:
        """Held-out task loss, POPE, CHAIR with coverage, and the gap, by "group/name"."""
        weights, _ = split(parameters)
        stages = [
            ("task loss", lambda: {"task_loss": self._task_loss(parameters, exam)}),
            *((f"pope_{name}", partial(self._pope, weights, exam, name)) for name in exam.asked),
            ("chair", lambda: self._chair(weights, exam)),
            ("gap", lambda: self._gap(parameters, exam)),
        ]
        found: Metrics = {}
        for done, (group, measure) in enumerate(stages):
            yield Progress("evaluation", done, len(stages), group)
            with torch.no_grad():
                measured = measure()
            prefix = "" if group == "task loss" else f"{group}/"
            found |= {f"{prefix}{name}": value for name, value in measured.items()}
        yield Progress("evaluation", len(stages), len(stages))
        return found

    @torch.no_grad()
    def embed(self, parameters: Params, exam: Exam) -> Embeddings:
        """Embeddings of every picture, caption and hallucinated caption."""
        weights, _ = split(parameters)
        found = []
        for part in chunks(len(exam.scenes), CHUNK):
            lines = self._move(exam.captions.take(part))
            image = call(self.network, weights, "image", **self._move(exam.pictures.take(part)))
            flat = {name: lines[name].flatten(0, 1) for name in ("ids", "mask")}
            text = call(self.network, weights, "text", **flat).unflatten(0, lines["ids"].shape[:2])
            found.append((image.cpu(), text[:, 0].cpu(), text[:, 1:].cpu()))
        return Embeddings(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def describe(self, weights: Params, exam: Exam) -> list[str]:
        """Greedy captions."""
        asked = prompt_ids(DESCRIBE, self.tokenizer, self.template)
        lines = []
        for part in chunks(len(exam.scenes), CHUNK):
            tokens = call(
                self.network,
                weights,
                "captions",
                ids=torch.tensor(asked, device=self.device),
                length=CAPTION_TOKENS,
                **self._move(exam.pictures.take(part)),
            )
            lines += [self._until_end(row) for row in tokens.tolist()]
        return lines

    def _until_end(self, ids: list[int]) -> str:
        said, _ = until_end(ids, self.tokenizer.ends)
        return self.tokenizer.decode(said)

    def _gap(self, parameters: Params, exam: Exam) -> Metrics:
        found = self.embed(parameters, exam)
        return gap(*found, exam.captions.present, [scene.caption for scene in exam.scenes])

    def _chair(self, weights: Params, exam: Exam) -> Metrics:
        reader = Lexicon(self.vocabulary)
        said = [reader.names(line) for line in self.describe(weights, exam)]
        found = chair(said, [scene.names for scene in exam.scenes])
        return {**found, "without_object": without_object(said)}

    def _pope(self, weights: Params, exam: Exam, name: str) -> Metrics:
        rows, scene, answers, names = exam.asked[name]
        words = answer_words(self.tokenizer, self.template)
        scores = []
        for part in chunks(len(rows), 2 * CHUNK):
            batch = self._move(rows.take(torch.arange(len(rows))[part]))
            logits = call(
                self.network,
                weights,
                "logits",
                ids=batch["ids"],
                mask=batch["mask"],
                prefix=batch["prefix"],
                **self._move(exam.pictures.take(scene[part])),
            )
            scores.append(answer_scores(logits, batch["mask"], words).cpu())
        return {**pope(torch.cat(scores), answers), **blind(names, answers, scene.tolist())}

    def _task_loss(self, parameters: Params, exam: Exam) -> float:
        total, tokens = 0.0, 0
        for part in chunks(len(exam.scenes), CHUNK):
            batch = exam.dialogues.take(torch.arange(len(exam.scenes))[part])
            count = int(batch["counted"].sum())
            batch = self._move({**batch, **exam.pictures.take(part)})
            total += float(task(self.network, parameters, batch)) * count
            tokens += count
        return total / tokens

    def _move(self, value: Any) -> Any:
        return tree.to(value, self.device, self.dtype)
