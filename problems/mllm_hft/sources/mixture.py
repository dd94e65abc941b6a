"""Training pictures from several sources, which are weighed against each other by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from bilevel import rng
from bilevel.components import Slot, component
from bilevel.errors import ProblemError

from .protocol import Corpus, Kind, Simulator, Split


@component
class Mixture:
    """Training pictures in equal numbers from each part; all other splits from `clean`. A `Source`.

    The name of a part is the `origin` of its scenes: the lower loss weighs one origin against
    another, and the weights are upper variables (`formulation: weighted`). Parts draw pictures
    (`shapes`, `photos`) and have the same names, colours and kinds; files of several origins are
    told apart by `origin` in a `jsonl` file instead.
    """

    parts: Annotated[dict[str, Annotated[Simulator, Slot("mllm_sources")]], Field(min_length=1)]
    """Sources of the training pictures, by name."""
    clean: Annotated[Simulator, Slot("mllm_sources")]
    """Source of every other split, and of what `tiny` and `vit` are pretrained on."""

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            for what in ("vocabulary", "colours", "kinds"):
                got, expected = getattr(part, what), getattr(self.clean, what)
                if got != expected:
                    raise ProblemError(
                        f"mixture.parts.{name}: {what} {_some(got)}, where those of clean are "
                        f"{_some(expected)}; parts of a mixture tell of the same things"
                    )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self.clean.vocabulary

    @property
    def colours(self) -> tuple[str, ...]:
        return self.clean.colours

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return self.clean.kinds

    def corpus(self, split: Split, size: int, *, generator: torch.Generator) -> Corpus:
        if split != "train":
            return self.clean.corpus(split, size, generator=generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        each, more = divmod(size, len(self.parts))
        found = []
        for i, (name, part) in enumerate(self.parts.items()):
            stream = rng.stream(seed, f"mixture.{name}")
            corpus = part.corpus(split, each + (i < more), generator=stream)
            scenes = tuple(replace(scene, origin=name) for scene in corpus.scenes)
            found.append(replace(corpus, scenes=scenes))
        images = torch.cat([corpus.images for corpus in found])
        return Corpus(tuple(scene for corpus in found for scene in corpus.scenes), images)

    @property
    def simulator(self) -> Simulator:
        return self.clean


def _some(words: tuple[str, ...]) -> str:
    shown = ", ".join(words[:3]) or "none"
    return f"{shown}, …" if len(words) > 3 else shown
