"""What the alignment problem needs of its data: scenes with exact truth, pictures, one interface."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bilevel.events import Progress

Kind = Literal["object", "attribute", "relation", "count"]
"""What a hallucinated caption gets wrong."""
KINDS: tuple[Kind, ...] = ("object", "attribute", "relation", "count")


@dataclass(frozen=True)
class Thing:
    """One object in a picture: its name, its colour (None where unknown), and the centre in [0, 1]²."""

    name: str
    colour: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """The exact truth about a picture, its caption, and captions that are wrong in one known way."""

    things: tuple[Thing, ...]
    caption: str
    hallucinated: Mapping[Kind, str]
    """Only the kinds that this scene allows (no colour: no attribute swap)."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the objects that are there."""
        return frozenset(thing.name for thing in self.things)


@dataclass(frozen=True)
class Corpus:
    """Scenes with their pictures, in the same order."""

    scenes: tuple[Scene, ...]
    images: UInt8[Tensor, "scene 3 height width"]


@runtime_checkable
class Source(Protocol):
    """Where scenes come from. A frozen component, pure in the generator.

    `biased=True` draws objects that co-occur as in a language prior (training data); False draws
    them independently (clean and test data), so that a prior misleads.
    """

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every object name that can occur, most frequent (under bias) first."""
        ...

    @property
    def colours(self) -> tuple[str, ...]:
        """Every colour word that can occur; empty for a source that does not know colours."""
        ...

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of hallucinated caption this source can write."""
        ...

    def scenes(self, size: int, *, biased: bool, generator: torch.Generator) -> tuple[Scene, ...]:
        """The truth alone, without pictures: cheap, for text-only pretraining."""
        ...

    def render(self, scenes: tuple[Scene, ...], generator: torch.Generator) -> Corpus:
        """Draw the pictures."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A frozen vision encoder: a component, so nothing is kept in it between calls."""

    def encode(
        self, corpus: Corpus, source: Source
    ) -> Generator[Progress, None, Float[Tensor, "scene token feature"]]:
        """Features per picture, float32 on CPU: `features = yield from encoder.encode(corpus, source)`.

        Weights and features are made once and cached on disk under a hash of what determines
        them; the generator yields its progress while it makes them, and returns the features.
        `source` is what an encoder that trains its own weights trains on (other scenes of it).
        """
        ...
