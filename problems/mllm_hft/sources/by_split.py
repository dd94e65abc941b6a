"""Files by split: what the lower level trains on, what the upper level sees, what is measured."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import torch

from bilevel.components import Slot, component
from bilevel.errors import ProblemError

from .files import FileSource, refuse_shared
from .naming import Naming, united
from .protocol import KINDS, Corpus, Kind, Source, Split


@component
class BySplit:
    """One source of files for each split, each of any layout. A `Source`.

    A part gives all its pictures to its split; to divide one file, name it twice with `portion`.
    """

    train: Annotated[Source, Slot("mllm_sources")]
    """Pictures of the lower level."""
    upper: Annotated[Source, Slot("mllm_sources")]
    """Pictures of the upper level."""
    test: Annotated[Source, Slot("mllm_sources")]
    """Pictures that are reported on."""
    development: Annotated[Source | None, Slot("mllm_sources")] = None
    """Pictures to choose settings on."""

    def __post_init__(self) -> None:
        for split, part in self._given.items():
            if not isinstance(part, FileSource):
                raise ProblemError(
                    f"by_split.{split} = {type(part).__name__}; must read files: jsonl, coco, "
                    "pope, amber, rlhf_v or llava"
                )

    @property
    def _given(self) -> dict[Split, Source]:
        parts: dict[Split, Source | None] = {
            "train": self.train,
            "upper": self.upper,
            "development": self.development,
            "test": self.test,
        }
        return {split: part for split, part in parts.items() if part is not None}

    @cached_property
    def _parts(self) -> dict[Split, FileSource]:
        """Read, and checked to share no picture."""
        parts: dict[Split, FileSource] = {
            s: part for s, part in self._given.items() if isinstance(part, FileSource)
        }
        refuse_shared({s: (part, part.reading.records) for s, part in parts.items()})
        return parts

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Names of training data first, as frequent there; then those of the other splits."""
        names = (name for naming in self._namings.values() for name in naming.vocabulary)
        return tuple(dict.fromkeys(names))

    @cached_property
    def _namings(self) -> dict[Split, Naming]:
        """The records of each split, read with the words of all splits together.

        A split whose words are given (`synonyms`, AMBER's lists) is read with those alone.
        """
        joint = united(
            [part.lexicon for part in self._parts.values() if part.reading.association is None]
        )
        return {
            split: part.naming
            if part.reading.is_final
            else Naming(part.reading.records, joint, part.seed)
            for split, part in self._parts.items()
        }

    @property
    def colours(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        found = {kind for part in self._parts.values() for kind in part.kinds}
        return tuple(kind for kind in (*KINDS, "other") if kind in found)

    def corpus(self, split: Split, size: int, *, generator: torch.Generator) -> Corpus:
        if split not in self._parts:
            raise ProblemError(f"by_split has no {split}; name a source of files for it")
        part = self._parts[split]
        return part.gather(part.reading.records, size, generator, split, self._namings[split])
