"""Conversations about a picture, as rows of ids with masks that say which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bilevel.errors import ProblemError

from .tokenizer import Tokenizer

Turn = tuple[str, str]
"""A prompt and its answer."""

PICTURE = "<image>"


@dataclass(frozen=True)
class Template:
    """How a turn is written around the picture: "<image>\\n{prompt}" with the model's own marks."""

    turn: str = "<image> {prompt}"

    def __post_init__(self) -> None:
        if self.turn.count(PICTURE) != 1 or self.turn.count("{prompt}") != 1:
            raise ProblemError(
                f"template = {self.turn!r}; must hold {PICTURE!r} and '{{prompt}}' once each, "
                "for example 'USER: <image>\\n{prompt} ASSISTANT:'"
            )

    @property
    def before(self) -> str:
        """What stands in front of the picture."""
        return self.turn.split(PICTURE)[0].strip()

    def prompt(self, prompt: str, *, first: bool) -> str:
        """A prompt as it stands after the picture (first) or later, when there is none."""
        form = self.turn.split(PICTURE)[1] if first else self.turn.replace(PICTURE, "")
        return form.replace("{prompt}", prompt).strip()


@dataclass(frozen=True)
class Rows:
    """Padded sequences; `mask` is what is no padding, `counted` what the task loss counts."""

    ids: Int[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    counted: Bool[Tensor, "row token"]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Int[Tensor, "batch"]) -> dict[str, Tensor]:
        """Some rows as a batch, cut to the longest of them."""
        mask = self.mask[index]
        width = int(mask.sum(1).max())
        return {
            "ids": self.ids[index, :width],
            "mask": mask[:, :width],
            "counted": self.counted[index, :width],
        }


def before(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Ids that every sequence begins with."""
    return (*tokenizer.start, *tokenizer.encode(template.before))


def turn_ids(
    turn: Turn, tokenizer: Tokenizer, template: Template, *, first: bool
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of what its answer adds to it, end token included.

    Encoded together, because many tokenizers write a word otherwise at the start of a text.
    """
    asked = template.prompt(turn[0], first=first)
    prompt = tokenizer.encode(asked)
    return prompt, [*tokenizer.encode(f"{asked} {turn[1]}")[len(prompt) :], tokenizer.end]


def conversations(
    turns: Sequence[Sequence[Turn]],
    tokenizer: Tokenizer,
    template: Template,
    contexts: Sequence[str] | None = None,
) -> Rows:
    """A row a conversation: prompt, answer, end; prompt, answer, end; …

    Answers and their end tokens are counted. `contexts` put a text where the picture would be.
    """
    rows = []
    for i, conversation in enumerate(turns):
        ids = tokenizer.encode(contexts[i]) if contexts else []
        counted = [False] * len(ids)
        for j, turn in enumerate(conversation):
            asked, said = turn_ids(turn, tokenizer, template, first=j == 0)
            ids += asked + said
            counted += [False] * len(asked) + [True] * len(said)
        rows.append((ids, counted))
    return pad(rows, tokenizer)


def prompts(
    lines: Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    contexts: Sequence[str] | None = None,
) -> Rows:
    """A row a prompt, and a last token that only holds the place where the answer is to begin."""
    rows = []
    for i, line in enumerate(lines):
        context = tokenizer.encode(contexts[i]) if contexts else []
        asked = tokenizer.encode(template.prompt(line, first=True))
        rows.append(([*context, *asked, tokenizer.end], []))
    return pad(rows, tokenizer)


def texts(lines: Sequence[str], tokenizer: Tokenizer) -> Rows:
    """A row a text, with the end token at which its embedding is read."""
    return pad([([*tokenizer.encode(line), tokenizer.end], []) for line in lines], tokenizer)


def pad(rows: Sequence[tuple[list[int], list[bool]]], tokenizer: Tokenizer) -> Rows:
    """Rows of one width; padded on the right, where causal attention never looks."""
    width = max((len(ids) for ids, _ in rows), default=0)
    ids = torch.full((len(rows), width), tokenizer.pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    counted = torch.zeros_like(mask)
    for i, (line, counts) in enumerate(rows):
        ids[i, : len(line)] = torch.tensor(line)
        mask[i, : len(line)] = True
        counted[i, : len(counts)] = torch.tensor(counts, dtype=torch.bool)
    return Rows(ids, mask, counted)
