"""Words to numbers: a closed vocabulary for the embedded model, or a checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bilevel.errors import ProblemError, nearest

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
    def opening(self) -> tuple[int, ...]:
        """What a text begins with that has no picture before it, beside `start`."""
        ...

    @property
    def pad(self) -> int: ...

    @property
    def end(self) -> int:
        """What ends an answer or a text that this package writes."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """Everything at which a generated text is over; `end` is one of them."""
        ...

    @property
    def picture(self) -> int | None:
        """The token that a picture's place is written with; None where there is none."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """How special tokens are written: in a text they become those tokens."""
        ...

    def spellings(self, word: str) -> tuple[str, ...]:
        """The ways of writing a word that the vocabulary may hold."""
        ...

    def encode(self, text: str, after: int | None = None, then: int | None = None) -> list[int]:
        """Ids of the text, nothing put before or behind.

        `after` and `then` are the special tokens beside it: many tokenizers write a word otherwise
        at the start of a text, and some special tokens take in the white space next to them.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        ...


def until_end(ids: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Generated ids before the first end token, and whether there is one (else they were cut)."""
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place]), True
    return list(ids), False


class WordTokenizer:
    """One id a word of a closed vocabulary; words are separated by spaces."""

    pad, end, ends, start, opening, picture, marks = 0, 2, (2,), (1,), (), None, SPECIAL

    def __init__(self, words: Iterable[str]) -> None:
        self.words = (*SPECIAL, *dict.fromkeys(words))

    @property
    def size(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def spellings(self, word: str) -> tuple[str, ...]:
        return (word,)

    def encode(self, text: str, after: int | None = None, then: int | None = None) -> list[int]:
        """Raises `ProblemError` for a word outside the vocabulary."""
        return [self._id(word, text) for word in text.split()]

    def _id(self, word: str, text: str) -> int:
        if word in self._ids:
            return self._ids[word]
        near = nearest(word, self.words)
        hint = f" Did the source mean {near[0]!r}?" if near else ""
        raise ProblemError(
            f"the word {word!r} of {text!r} is not among the {len(self.words) - len(SPECIAL)} "
            f"words of this source; add it to the source's vocabulary.{hint}"
        )

    def save_pretrained(self, folder: Path) -> None:
        """As a tokenizer of transformers that gives the same ids."""
        import tokenizers
        import transformers

        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(self._ids, unk_token=SPECIAL[0]))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        marks = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
        fast.save_pretrained(folder)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids if i >= len(SPECIAL))


class PretrainedTokenizer:
    """A tokenizer of transformers, held to the rows of the model's embeddings.

    `ends` are those of the model's generation_config; without them the tokenizer's own end token.
    Raises `ProblemError` where there is no end token at all, and for text whose tokens have no row.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        rows: int | None = None,
        ends: Sequence[int] = (),
        picture: int | None = None,
        start: Sequence[int] | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        own: int | None = tokenizer.eos_token_id
        if own is None and not ends:
            raise ProblemError(
                "the checkpoint has no end token, at which embeddings are read: neither "
                "`eos_token_id` in generation_config.json nor `eos_token` in tokenizer_config.json; "
                "set one of them"
            )
        self.rows = len(tokenizer) if rows is None else rows
        self.ends: tuple[int, ...] = tuple(ends) if own is None or ends else (own,)
        self.end: int = self.ends[0] if own is None or own not in self.ends else own
        self.picture = picture
        self.opening = tuple(opening)
        self.start = self._start() if start is None else tuple(start)

    @property
    def size(self) -> int:
        return self.rows

    @property
    def pad(self) -> int:
        """The tokenizer's, unless it was added without a row in the embeddings: masks rule it out."""
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None or pad >= self.rows else pad

    @property
    def marks(self) -> tuple[str, ...]:
        own = self.tokenizer.added_tokens_decoder.values()
        listed = (*self.tokenizer.all_special_tokens, *(str(t) for t in own if t.special))
        return tuple(dict.fromkeys(listed))

    def spellings(self, word: str) -> tuple[str, ...]:
        return word, word.capitalize(), word.upper()

    def encode(self, text: str, after: int | None = None, then: int | None = None) -> list[int]:
        left, right = ([] if mark is None else [mark] for mark in (after, then))
        marks = [self.tokenizer.convert_ids_to_tokens(i) for i in (*left, *right)]
        whole = f"{marks[0] if left else ''}{text}{marks[-1] if right else ''}"
        ids = self.tokenizer.encode(whole, add_special_tokens=False)
        ids = ids[len(left) : len(ids) - len(right)]
        beyond = [i for i in ids if i >= self.rows and i != self.picture]
        if beyond:
            raise ProblemError(
                f"the token {self.tokenizer.convert_ids_to_tokens(beyond[0])!r} of {text!r} has id "
                f"{beyond[0]}, and the model has {self.rows} rows of embeddings: the tokenizer was "
                "extended and the model was not; call model.resize_token_embeddings("
                "len(tokenizer)), train the new rows and save both"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _start(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a")
        for place in range(len(whole) - len(bare) + 1):
            if whole[place : place + len(bare)] == bare:
                return tuple(whole[:place])
        return ()
