"""The evaluated split, and every measure of a model on it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilevel import tree
from bilevel.events import Progress, Warned
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
from ..sources.mentions import Association, Lexicon
from ..sources.protocol import Corpus, Kind, Scene, Source
from .measures import Metrics, gap
from .questions import STRATEGIES, Question, own_questions, questions
from .reports import Findings, report_captions, report_pictures, report_questions

CHUNK = 128
CAPTION_TOKENS = 48
ANSWER_TOKENS = 8


class PopeQuestions(NamedTuple):
    """Questions of one group, such as a POPE split."""

    rows: Rows
    questions: tuple[Question, ...]

    @property
    def scene(self) -> Int[Tensor, "question"]:
        return torch.tensor([question.scene for question in self.questions])


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
        rows.ids.unflatten(0, shape),
        rows.mask.unflatten(0, shape),
        torch.tensor(present, dtype=torch.bool),
    )


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

    @property
    def has_captions(self) -> bool:
        """Whether every picture has a true caption, which the gap is measured with."""
        return all(scene.caption for scene in self.scenes)


def make_exam(
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
    )


@dataclass(frozen=True)
class Examiner:
    """Runs a model over an exam; batches go where the model is."""

    network: Network
    tokenizer: Tokenizer
    template: Template
    kinds: tuple[Kind, ...]
    device: torch.device
    dtype: torch.dtype
    generate_answers: bool = False
    """Measure answers that are written out, too, beside those read off the logits."""

    def measure(
        self, parameters: Params, exam: EvaluationSplit
    ) -> Generator[Progress | Warned, None, Findings]:
        """Task loss, answers, captions and the gap, with a row for each question and picture."""
        weights, _ = split(parameters)
        found = Findings()
        stages: list[tuple[str, Callable[[], None]]] = [
            ("task loss", lambda: found.add("", self._task_loss(parameters, exam))),
            *((name, partial(self._ask, found, weights, exam, name)) for name in exam.asked),
            ("captions", lambda: self._caption(found, weights, exam)),
        ]
        if exam.has_captions:
            stages.append(("gap", lambda: self._gap(found, parameters, exam)))
        for done, (name, stage) in enumerate(stages):
            yield Progress("evaluation", done, len(stages), name)
            with torch.no_grad():
                stage()
        yield Progress("evaluation", len(stages), len(stages))
        for kind, message in found.warnings.items():
            yield Warned(0, kind, message)
        return found.finish()

    @torch.no_grad()
    def embed(self, parameters: Params, exam: EvaluationSplit) -> Embeddings:
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

    def describe(self, weights: Params, exam: EvaluationSplit) -> tuple[list[str], list[bool]]:
        """Greedy captions, and whether each ended by itself before `CAPTION_TOKENS`."""
        by_instruction: dict[str, list[int]] = {}
        for i, scene in enumerate(exam.scenes):
            by_instruction.setdefault(scene.instruction, []).append(i)
        said: dict[int, tuple[str, bool]] = {}
        for instruction, places in by_instruction.items():
            asked = prompt_ids(instruction, self.tokenizer, self.template)
            lines = self._generate(weights, exam, torch.tensor(places), asked, CAPTION_TOKENS)
            said |= dict(zip(places, lines, strict=True))
        found = [said[i] for i in range(len(exam.scenes))]
        return [text for text, _ in found], [ended for _, ended in found]

    def _generate(
        self, weights: Params, exam: EvaluationSplit, scene: Tensor, asked: list[int], length: int
    ) -> list[tuple[str, bool]]:
        """Greedy continuations of one prompt about some scenes."""
        lines = []
        for part in scene.split(CHUNK):
            tokens = call(
                self.network,
                weights,
                "captions",
                ids=torch.tensor(asked, device=self.device),
                length=length,
                **self._move(exam.pictures.take(part)),
            )
            lines += [self._until_end(row) for row in tokens.tolist()]
        return lines

    def _until_end(self, ids: list[int]) -> tuple[str, bool]:
        said, ended = until_end(ids, self.tokenizer.ends)
        return self.tokenizer.decode(said), ended

    def _gap(self, found: Findings, parameters: Params, exam: EvaluationSplit) -> None:
        embeddings, present = self.embed(parameters, exam), exam.captions.present
        found.add("gap", gap(*embeddings, present, [scene.caption for scene in exam.scenes]))
        report_pictures(found, *embeddings, present, self.kinds, exam.scenes)

    def _caption(self, found: Findings, weights: Params, exam: EvaluationSplit) -> None:
        said, ended = self.describe(weights, exam)
        report_captions(found, said, ended, exam.scenes, exam.lexicon, exam.association)

    def _ask(self, found: Findings, weights: Params, exam: EvaluationSplit, name: str) -> None:
        asked = exam.asked[name]
        scores = self._scores(weights, exam, asked)
        said = self._answers(weights, exam, asked) if self.generate_answers else None
        report_questions(found, name, asked.questions, exam.scenes, scores, said)

    def _scores(
        self, weights: Params, exam: EvaluationSplit, asked: PopeQuestions
    ) -> Float[Tensor, "question"]:
        rows, scene = asked.rows, asked.scene
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
        return torch.cat(scores)

    def _answers(self, weights: Params, exam: EvaluationSplit, asked: PopeQuestions) -> list[str]:
        """Answers written out; questions of one wording go together."""
        places: dict[str, list[int]] = {}
        for i, question in enumerate(asked.questions):
            places.setdefault(question.text, []).append(i)
        said: dict[int, str] = {}
        for text, rows in places.items():
            prompt = prompt_ids(text, self.tokenizer, self.template)
            scene = asked.scene[torch.tensor(rows)]
            lines = self._generate(weights, exam, scene, prompt, ANSWER_TOKENS)
            said |= {i: line for i, (line, _) in zip(rows, lines, strict=True)}
        return [said[i] for i in range(len(asked.questions))]

    def _task_loss(self, parameters: Params, exam: EvaluationSplit) -> Metrics:
        total, tokens = 0.0, 0
        for part in chunks(len(exam.talked), CHUNK):
            batch = exam.dialogues.take(torch.arange(len(exam.talked))[part])
            count = int(batch["counted"].sum())
            batch = self._move({**batch, **exam.pictures.take(exam.talked[part])})
            total += float(task(self.network, parameters, batch)) * count
            tokens += count
        return {"task_loss": total / tokens} if tokens else {}

    def _move(self, value: Any) -> Any:
        return tree.to(value, self.device, self.dtype)
