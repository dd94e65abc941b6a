"""Conversations about a picture, as rows of ids with masks that say which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .template import Template
from .tokenizer import Tokenizer

Turn = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Rows:
    """Padded sequences; `mask` is what is not padding, `counted` what the task loss counts."""

    ids: Int[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    counted: Bool[Tensor, "row token"]
    prefix: Int[Tensor, "row"]
    """How many tokens the first prompt has: what a model with prefix attention sees both ways."""

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
            "places": places(self.counted[index]),
            "prefix": self.prefix[index],
        }


def places(counted: Bool[Tensor, "row token"]) -> Int[Tensor, "row answer"]:
    """Where `counted` holds, as many places a row as the fullest row has.

    They come first and in order; a row with fewer is filled up with places that are not counted, so
    that no place stands twice and a sum over `counted` at these places is the sum over all.
    """
    most = int(counted.sum(1).max()) if len(counted) else 0
    return counted.int().argsort(dim=1, descending=True, stable=True)[:, :most]


def before(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Ids that every sequence begins with: the tokenizer's own, and what precedes the picture."""
    ids = tokenizer.encode(template.before, then=tokenizer.picture)
    written = tuple(ids[: len(tokenizer.start)]) == tokenizer.start
    return tuple(ids) if written else (*tokenizer.start, *ids)


def turn_ids(
    turn: Turn, tokenizer: Tokenizer, template: Template, *, first: bool, after: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of what its answer adds to it, end token included.

    Encoded together, because many tokenizers write a word otherwise at the start of a text; what
    both have in common is the prompt. A later turn stands after the token that ended an answer.
    """
    follows = tokenizer.picture if first else after
    asked = template.prompt(turn[0], first=first)
    whole = tokenizer.encode(f"{asked}{template.answer(turn[1])}", follows)
    alone = tokenizer.encode(asked, follows)
    differ = (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b)
    shared = next(differ, min(len(alone), len(whole)))
    return whole[:shared], whole[shared:] + ([] if template.close else [tokenizer.end])


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
        counted, prefix = [False] * len(ids), 0
        for j, turn in enumerate(conversation):
            after = ids[-1] if j else None
            asked, said = turn_ids(turn, tokenizer, template, first=j == 0, after=after)
            ids += asked + said
            counted += [False] * len(asked) + [True] * len(said)
            prefix = prefix or len(ids) - len(said)
        rows.append((ids, counted, prefix))
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
        ids = [*context, *prompt_ids(line, tokenizer, template)]
        rows.append(([*ids, tokenizer.end], [], len(ids)))
    return pad(rows, tokenizer)


def prompt_ids(line: str, tokenizer: Tokenizer, template: Template) -> list[int]:
    """A first prompt, as it stands after the picture."""
    return tokenizer.encode(template.prompt(line, first=True), tokenizer.picture)


def texts(lines: Sequence[str], tokenizer: Tokenizer) -> Rows:
    """A row a text, with the end token at which its embedding is read."""
    rows = [[*tokenizer.opening, *tokenizer.encode(line), tokenizer.end] for line in lines]
    return pad([(ids, [], 0) for ids in rows], tokenizer)


def pad(rows: Sequence[tuple[list[int], list[bool], int]], tokenizer: Tokenizer) -> Rows:
    """Rows of one width; padded on the right, where causal attention never looks."""
    width = max((len(ids) for ids, _, _ in rows), default=0)
    ids = torch.full((len(rows), width), tokenizer.pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    counted = torch.zeros_like(mask)
    for i, (line, counts, _) in enumerate(rows):
        ids[i, : len(line)] = torch.tensor(line)
        mask[i, : len(line)] = True
        counted[i, : len(counts)] = torch.tensor(counts, dtype=torch.bool)
    return Rows(ids, mask, counted, torch.tensor([prefix for _, _, prefix in rows]))
