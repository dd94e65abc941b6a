"""Every measure of a model on an evaluation split."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.events import Progress, Tabulated, Warned
from bilevel.types import Params

from ..formulations import split, task
from ..models.instructions import prompt_ids
from ..models.network import Network, call, chunks
from ..models.pretrain import answer_scores, answer_words, last_place
from ..models.template import Template
from ..models.tokenizer import Tokenizer, until_end
from ..sources.protocol import Kind
from .evaluation_split import EvaluationSplit, PopeQuestions
from .measures import Metrics, gap
from .reports import (
    Findings,
    report_captions,
    report_endings,
    report_pictures,
    report_questions,
    report_undescribed,
)

ANSWER_TOKENS = 8


class Embeddings(NamedTuple):
    """Pictures, true captions and hallucinated captions through the heads, on CPU."""

    image: Float[Tensor, "described embedding"]
    text: Float[Tensor, "described embedding"]
    hallucinated: Float[Tensor, "described kind embedding"]


@dataclass(frozen=True)
class Evaluator:
    """Measures a model on an evaluation split; batches go where the model is."""

    network: Network
    tokenizer: Tokenizer
    template: Template
    kinds: tuple[Kind, ...]
    device: torch.device
    dtype: torch.dtype
    generate_answers: bool = False
    """Measure answers that are written out, too, beside those read off the logits."""
    caption_tokens: int = 48
    """A caption that has not ended by then is cut."""
    rows: int = 128
    """Pictures or conversations that pass the model at a time."""

    def measure(
        self, parameters: Params, evaluation: EvaluationSplit
    ) -> Generator[Progress | Warned | Tabulated, None, Findings]:
        """Task loss, answers, captions and the gap, with a row for each question and picture."""
        weights, _ = split(parameters)
        found = Findings()
        stages: list[tuple[str, Callable[[], None]]] = [
            ("task loss", lambda: found.add("", self._task_loss(parameters, evaluation))),
            *(
                (name, partial(self._ask, found, weights, evaluation, name))
                for name in evaluation.asked
            ),
            ("captions", lambda: self._caption(found, weights, evaluation)),
        ]
        report_undescribed(found, len(evaluation.described), len(evaluation.scenes))
        if evaluation.has_captions:
            stages.append(("gap", lambda: self._gap(found, parameters, evaluation)))
        for done, (name, stage) in enumerate(stages):
            yield Progress("evaluation", done, len(stages), name)
            with torch.no_grad():
                stage()
        yield Progress("evaluation", len(stages), len(stages))
        for kind, message in found.warnings.items():
            yield Warned(0, kind, message)
        for name, rows in found.rows.items():
            yield Tabulated(0, name, tuple(rows))
        return found.finish()

    @torch.no_grad()
    def embed(self, parameters: Params, evaluation: EvaluationSplit) -> Embeddings:
        """Embeddings of every picture that has a caption, and of its captions, in float32 at least."""
        weights, _ = split(parameters)
        found = []
        for part in evaluation.described.split(self.rows):
            lines = self._move(evaluation.captions.take(part))
            image = call(
                self.network, weights, "image", **self._move(evaluation.pictures.take(part))
            )
            flat = {name: lines[name].flatten(0, 1) for name in ("ids", "mask")}
            text = call(self.network, weights, "text", **flat).unflatten(0, lines["ids"].shape[:2])
            image, text = (_at_least_float32(one.cpu()) for one in (image, text))
            found.append((image, text[:, 0], text[:, 1:]))
        return Embeddings(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def describe(
        self, weights: Params, evaluation: EvaluationSplit, first: int | None = None
    ) -> tuple[list[str], list[bool]]:
        """Greedy captions, and whether each ended by itself within `caption_tokens`.

        Of the `first` pictures, None for all.
        """
        by_instruction: dict[str, list[int]] = {}
        for i, scene in enumerate(evaluation.scenes[:first]):
            by_instruction.setdefault(scene.instruction, []).append(i)
        said: dict[int, tuple[str, bool]] = {}
        for instruction, places in by_instruction.items():
            asked = prompt_ids(instruction, self.tokenizer, self.template)
            scenes, allowed = torch.tensor(places), self.caption_tokens
            lines = self._generate(weights, evaluation, scenes, asked, allowed)
            said |= dict(zip(places, lines, strict=True))
        found = [said[i] for i in range(len(said))]
        return [text for text, _ in found], [ended for _, ended in found]

    def _generate(
        self,
        weights: Params,
        evaluation: EvaluationSplit,
        scene: Tensor,
        asked: list[int],
        length: int,
    ) -> list[tuple[str, bool]]:
        """Greedy continuations of one prompt about some scenes."""
        lines = []
        for part in scene.split(self.rows):
            tokens = call(
                self.network,
                weights,
                "captions",
                ids=torch.tensor(asked, device=self.device),
                length=length,
                **self._move(evaluation.pictures.take(part)),
            )
            lines += [self._until_end(row) for row in tokens.tolist()]
        return lines

    def _until_end(self, ids: list[int]) -> tuple[str, bool]:
        said, ended = until_end(ids, self.tokenizer.ends)
        return self.tokenizer.decode(said), ended

    def _gap(self, found: Findings, parameters: Params, evaluation: EvaluationSplit) -> None:
        described = evaluation.described
        scenes = [evaluation.scenes[i] for i in described.tolist()]
        embeddings = self.embed(parameters, evaluation)
        present = evaluation.captions.present[described]
        found.add("gap", gap(*embeddings, present, [scene.caption for scene in scenes]))
        report_pictures(found, *embeddings, present, self.kinds, scenes)

    def _caption(self, found: Findings, weights: Params, evaluation: EvaluationSplit) -> None:
        said, ended = self.describe(weights, evaluation)
        report_endings(found, ended, self.caption_tokens)
        report_captions(
            found, said, ended, evaluation.scenes, evaluation.lexicon, evaluation.association
        )

    def _ask(
        self, found: Findings, weights: Params, evaluation: EvaluationSplit, name: str
    ) -> None:
        asked = evaluation.asked[name]
        scores = self._scores(weights, evaluation, asked)
        said = self._answers(weights, evaluation, asked) if self.generate_answers else None
        report_questions(found, name, asked.questions, evaluation.scenes, scores, said)

    def _scores(
        self, weights: Params, evaluation: EvaluationSplit, asked: PopeQuestions
    ) -> Float[Tensor, "question"]:
        rows, scene = asked.rows, asked.scene
        words = answer_words(self.tokenizer, self.template)
        scores = []
        for part in chunks(len(rows), 2 * self.rows):
            batch = self._move(rows.take(torch.arange(len(rows))[part]))
            logits = call(
                self.network,
                weights,
                "logits",
                ids=batch["ids"],
                mask=batch["mask"],
                prefix=batch["prefix"],
                places=last_place(batch["mask"]),
                **self._move(evaluation.pictures.take(scene[part])),
            )
            scores.append(answer_scores(logits, words).cpu())
        return torch.cat(scores)

    def _answers(
        self, weights: Params, evaluation: EvaluationSplit, asked: PopeQuestions
    ) -> list[str]:
        """Answers written out; questions of one wording go together."""
        places: dict[str, list[int]] = {}
        for i, question in enumerate(asked.questions):
            places.setdefault(question.text, []).append(i)
        said: dict[int, str] = {}
        for text, rows in places.items():
            prompt = prompt_ids(text, self.tokenizer, self.template)
            scene = asked.scene[torch.tensor(rows)]
            lines = self._generate(weights, evaluation, scene, prompt, ANSWER_TOKENS)
            said |= {i: line for i, (line, _) in zip(rows, lines, strict=True)}
        return [said[i] for i in range(len(asked.questions))]

    def _task_loss(self, parameters: Params, evaluation: EvaluationSplit) -> Metrics:
        total, tokens = 0.0, 0
        for part in chunks(len(evaluation.talked), self.rows):
            batch = evaluation.dialogues.take(torch.arange(len(evaluation.talked))[part])
            count = int(batch["counted"].sum())
            batch = self._move({**batch, **evaluation.pictures.take(evaluation.talked[part])})
            total += float(task(self.network, parameters, batch)) * count
            tokens += count
        return {"task_loss": total / tokens} if tokens else {}

    def _move(self, value: Any) -> Any:
        return tree.to(value, self.device, self.dtype)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
