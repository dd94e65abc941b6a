"""Words to numbers: a closed vocabulary for the embedded model, or a checkpoint's own tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from bilevel.errors import ProblemError

SPECIAL = ("<pad>", "<s>", "</s>")
"""Padding, start and end: the first three ids of a `WordTokenizer`."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `pad` may equal `end`: which tokens count is said by masks alone."""

    @property
    def size(self) -> int:
        """Number of ids."""
        ...

    @property
    def start(self) -> tuple[int, ...]:
        """What every sequence begins with; empty where a tokenizer has no such token."""
        ...

    @property
    def pad(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing put before or after."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        ...


class WordTokenizer:
    """One id a word of a closed vocabulary; words are separated by spaces."""

    pad, end, start = 0, 2, (1,)

    def __init__(self, words: Iterable[str]) -> None:
        self.words = (*SPECIAL, *dict.fromkeys(words))

    @property
    def size(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Raises `ProblemError` for a word outside the vocabulary."""
        return [self._id(word, text) for word in text.split()]

    def _id(self, word: str, text: str) -> int:
        if word in self._ids:
            return self._ids[word]
        near = difflib.get_close_matches(word, self.words, n=1)
        hint = f" Did the source mean {near[0]!r}?" if near else ""
        raise ProblemError(
            f"the word {word!r} of {text!r} is not among the {len(self.words) - len(SPECIAL)} "
            f"words of this source; add it to the source's vocabulary.{hint}"
        )

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids if i >= len(SPECIAL))


class PretrainedTokenizer:
    """A tokenizer of transformers seen through the four facts that the problem needs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ProblemError(
                "the checkpoint's tokenizer has no end token (eos_token_id is None), at which "
                "embeddings are read; set `eos_token` in its tokenizer_config.json"
            )

    @property
    def size(self) -> int:
        return len(self.tokenizer)

    @property
    def start(self) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        return () if bos is None else (bos,)

    @property
    def pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None else pad

    @property
    def end(self) -> int:
        return self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
