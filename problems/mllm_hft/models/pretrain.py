"""Before pictures come: the language model learns text-only scenes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bilevel import rng
from bilevel.errors import ProblemError
from bilevel.events import Progress

from ..evaluation.questions import questions
from ..losses import task_loss
from ..memory import nbytes, rows_at_a_time
from ..sources.language import NO, YES, answer
from ..sources.protocol import Scene, Simulator, Source
from .cache import Tensors, cached
from .instructions import Rows, Turn, conversations, places, prompts, turn_ids
from .network import Network, chunks
from .template import Template
from .tokenizer import Tokenizer

QUESTIONS = 4
"""Questions in a training conversation, as many with yes as with no."""
ALONE = 0.2
"""Share of pictures that are described and asked nothing, as evaluation asks for captions. Where every
caption came after questions, two in five captions did not end: they went on into questions."""
READ = 0.2
"""What a token that is read and not answered weighs in the loss on text."""
Words = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens that say yes, and tokens that say no."""


@dataclass(frozen=True)
class TextTraining:
    """What the language model is trained on and for how long."""

    source: Simulator
    tokenizer: Tokenizer
    template: Template
    seed: int
    scenes: int
    steps: int
    batch: int
    rate: float
    held_out: int = 200
    """Unbiased scenes on which the language model is questioned afterwards."""
    read: float = READ
    """What a token that is read and not answered weighs: with 0 the output layer is at answers alone."""


def dialogues(
    scenes: tuple[Scene, ...], source: Source, generator: torch.Generator, *, alone: float = ALONE
) -> list[list[Turn]]:
    """One conversation a scene: its own; else yes/no questions, then the caption.

    Questions are the scene's own (`QUESTIONS` of them) or ask for random objects. Of scenes with a
    caption a share `alone` is described without a question.
    """
    unasked = torch.rand(len(scenes), generator=generator) < alone if alone else None
    turns: list[list[Turn]] = [[] for _ in scenes]
    for question in questions(
        scenes,
        strategy="random",
        vocabulary=source.vocabulary,
        per_scene=QUESTIONS,
        generator=generator,
    ):
        said = answer(scenes[question.scene], question.answer)
        turns[question.scene].append((question.text, said))
    for i, (scene, conversation) in enumerate(zip(scenes, turns, strict=True)):
        if scene.turns:
            conversation[:] = scene.turns
            continue
        own = [(question.text, answer(scene, question.answer)) for question in scene.questions]
        asked = own or conversation
        order = torch.randperm(len(asked), generator=generator)[:QUESTIONS].tolist()
        described = [(scene.instruction, scene.caption)] if scene.caption else []
        if described and unasked is not None and unasked[i]:
            order = []
        conversation[:] = [*(asked[k] for k in order), *described]
    return turns


def pretrain(
    network: Network, language: nn.Module, text: TextTraining
) -> Generator[Progress, None, None]:
    """Train `language` (embeddings, layers, output) on captions and on dialogues about them.

    Scenes are biased, so the language model learns which objects go together: the prior that
    later misleads it on unbiased pictures.
    """
    stream = rng.stream(text.seed, "text")
    scenes = text.source.scenes(text.scenes, biased=True, generator=stream)
    turns = dialogues(scenes, text.source, stream, alone=0.0)
    rows = conversations(
        [turn if i % 2 else turn[:-1] for i, turn in enumerate(turns)],
        text.tokenizer,
        text.template,
        contexts=[scene.caption for scene in scenes],
    )
    weights = _weights(rows, answer_words(text.tokenizer, text.template), text.read)

    def loss() -> Tensor:
        index = torch.randint(len(rows), (text.batch,), generator=stream)
        weight = weights[index]
        batch = {**rows.take(index), "weight": weight, "at": places(weight > 0)}
        batch = {name: value.to(network.device) for name, value in batch.items()}
        logits = network.logits(batch["ids"], batch["mask"], places=batch["at"])
        ids, told = (batch[name].gather(1, batch["at"]) for name in ("ids", "weight"))
        return task_loss(logits, ids, told)

    yield from train(language.parameters(), loss, "language model", text.steps, text.rate)


def learn_language(
    network: Network, language: nn.Module, text: TextTraining, kind: str, model: dict[str, Any]
) -> Generator[Progress, None, None]:
    """`pretrain`, cached under `kind`; `model` says which model `language` is part of."""

    def make() -> Generator[Progress, None, Tensors]:
        yield from pretrain(network, language, text)
        return language.state_dict()

    key = {
        **model,
        "training": [text.scenes, text.steps, text.batch, text.rate],
        **({} if text.read == READ else {"read": text.read}),
        "source": text.source,
        "seed": text.seed,
    }
    language.load_state_dict((yield from cached(kind, key, make)))


def _weights(rows: Rows, words: Words, read: float = READ) -> Float[Tensor, "row token"]:
    """5 for yes and no, 1 for the rest of an answer, `read` for what is read.

    Unweighted, yes and no are a twentieth of the tokens and stayed at chance for 1,000 steps;
    weighted, 400 steps answer 85 of 100 held-out questions.
    """
    weights = torch.where(rows.counted, 1.0, read) * rows.mask
    said = rows.counted & torch.isin(rows.ids, torch.tensor([*words[0], *words[1]]))
    return weights.masked_fill(said, 5.0)


def train(
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    stage: str,
    steps: int,
    rate: float,
) -> Iterator[Progress]:
    """Adam with a warm-up over a tenth of the steps and a cosine decay; gradients clipped at 1."""
    trained = [parameter.requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(trained, lr=rate)
    total = max(steps, 2)
    # torch divides by the length of the first phase, pct_start · total − 1: 0 where both make 1
    phase = {"total_steps": total, "pct_start": max(0.1, 1.5 / total)}
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, cycle_momentum=False, **phase
    )
    for step in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            yield Progress(stage, step + 1, steps, f"loss {float(value.detach()):.3f}")
    for parameter in trained:
        parameter.requires_grad_(False).grad = None


def question_accuracy(network: Network, text: TextTraining) -> float:
    """Share of right answers about held-out unbiased scenes read as captions; chance is 0.5."""
    stream = rng.stream(text.seed, "text.held_out")
    scenes = text.source.scenes(text.held_out, biased=False, generator=stream)
    asked = questions(
        scenes,
        strategy="random",
        vocabulary=text.source.vocabulary,
        per_scene=QUESTIONS,
        generator=stream,
    )
    rows = prompts(
        [question.text for question in asked],
        text.tokenizer,
        text.template,
        contexts=[scenes[question.scene].caption for question in asked],
    )
    words = answer_words(text.tokenizer, text.template)
    each = sum(network.decoding_bytes(rows.ids.shape[1] + len(network.before)))
    held = nbytes(network.parameters())
    size = rows_at_a_time(each, held, network.device, most=256)
    with torch.no_grad():
        scores = torch.cat(
            [
                answer_scores(network.logits(ids, mask, places=last_place(mask)), words).cpu()
                for part in chunks(len(rows), size)
                for ids, mask in [[v[part].to(network.device) for v in (rows.ids, rows.mask)]]
            ]
        )
    right = torch.tensor([question.answer for question in asked])
    return float(((scores > 0) == right).double().mean())


def answer_words(tokenizer: Tokenizer, template: Template) -> Words:
    """The tokens with which an answer can say yes, and no: "yes", "Yes", " Yes", … as they occur.

    Which of them a model answers with is left to its probabilities. A way of writing that takes several
    tokens, as "YES" does for LLaMA's tokenizer, does not count. A token that only begins a
    word counts where no token is the whole of it. Raises `ProblemError` where no token tells them
    apart.
    """
    yes, no = (_first_tokens(word, tokenizer, template) for word in (YES, NO))
    both = set(yes) & set(no)
    says_yes, says_no = (tuple(i for i in ids if i not in both) for ids in (yes, no))
    if not says_yes or not says_no:
        raise ProblemError(
            f"answers {YES!r} and {NO!r} begin with the same token for this tokenizer and template "
            f"({template.turn!r}), so their logits cannot be compared; end the template without "
            "white space"
        )
    return says_yes, says_no


def _first_tokens(word: str, tokenizer: Tokenizer, template: Template) -> list[int]:
    forms = [
        ids[0]
        for text in tokenizer.spellings(word)
        for ids in (
            turn_ids(("", text), tokenizer, template, first=True)[1],
            tokenizer.encode(text),
        )
    ]
    whole = [i for i in forms if tokenizer.decode([i]).strip().lower() == word]
    return list(dict.fromkeys(whole or forms))


def last_place(mask: Bool[Tensor, "row token"]) -> Int[Tensor, "row 1"]:
    """The last token that `mask` counts: the place of the answer in a row of `prompts`."""
    return mask.sum(1, keepdim=True) - 1


def answer_scores(logits: Float[Tensor, "row 1 word"], words: Words) -> Float[Tensor, "row"]:
    """log p(yes) − log p(no), from the logits at the place of the answer."""
    yes, no = (logits[:, 0, list(ids)].logsumexp(1) for ids in words)
    return yes - no
