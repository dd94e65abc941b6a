"""What the alignment problem needs of its data: pictures, and what is true and false of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.events import Progress

from .mentions import Association, Lexicon
from .pictures import PictureFiles

CPU = torch.device("cpu")
Split = Literal["train", "upper", "development", "test"]
"""Which pictures: the lower level's, the upper level's, those to choose settings on, the rest."""
SPLITS: tuple[Split, ...] = ("train", "upper", "development", "test")
Kind = Literal["object", "attribute", "relation", "count", "other"]
"""What a hallucinated caption gets wrong; "other" where that is not said (a rejected answer)."""
KINDS: tuple[Kind, ...] = ("object", "attribute", "relation", "count")
DESCRIBE = "describe the picture :"
"""The instruction that asks for a caption, in the closed language."""


@dataclass(frozen=True)
class Thing:
    """One object in a picture: its name, its colour (None where unknown), and the centre in [0, 1]²."""

    name: str
    colour: str | None
    x: float
    y: float


@dataclass(frozen=True)
class OwnQuestion:
    """A yes/no question that comes with a picture, and the benchmark split it belongs to."""

    text: str
    answer: bool
    group: str
    """Measures are named after it: "pope_adversarial", "amber_existence"."""
    name: str = ""
    """What it asks about; the blind rule sees this and nothing else. "": the whole text."""


@dataclass(frozen=True)
class Scene:
    """What is known of a picture: objects, a caption, and captions that are wrong in a known way."""

    things: tuple[Thing, ...]
    caption: str
    """"" where the source has none."""
    hallucinated: Mapping[Kind, str]
    """Only the kinds that this scene allows (no colour: no attribute swap)."""
    id: str = ""
    objects: frozenset[str] | None = None
    """Names of what is there, where places are not known; None: those of `things`."""
    annotated: bool = True
    """Whether what is not among `names` is known to be absent: else nothing is asked of it."""
    lures: frozenset[str] = frozenset()
    """Absent objects that a model is expected to invent (AMBER)."""
    questions: tuple[OwnQuestion, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    """A conversation about the picture that comes with it: prompts and answers."""
    instruction: str = DESCRIBE
    """What `caption` answers, and what asks the model for one."""
    at: object = field(default="", compare=False, repr=False)
    """What writes itself as the file and line that tell of it; "" where it is drawn."""
    ask: str | None = None
    """How a question that is made about it is put, "{question}" being POPE's; None: the closed language."""
    origin: str = ""
    """The part of a `mixture` that the picture comes from; "" where a source has no parts."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the objects that are there."""
        if self.objects is not None:
            return self.objects
        return frozenset(thing.name for thing in self.things)


@dataclass(frozen=True)
class Corpus:
    """Scenes with their pictures, in the same order."""

    scenes: tuple[Scene, ...]
    images: UInt8[Tensor, "scene 3 height width"] | PictureFiles
    """A tensor, or pictures of any size that are read when they are asked for."""
    lexicon: Lexicon | None = None
    """How captions are read for objects; None: the vocabulary in its plain forms."""
    association: Association | None = None
    """AMBER's word lists, where it is the benchmark."""
    notes: tuple[str, ...] = ()
    """What a user should know of this split: captions that could not be altered, pictures left out."""


class StaticMembers(type(Protocol)):
    """Members are looked for and not read, as of Python 3.12: `isinstance` opens no file."""

    def __instancecheck__(cls, instance: object) -> bool:
        if not cls.__dict__.get("_is_protocol", False):
            return super().__instancecheck__(instance)
        protocols = [base for base in cls.__mro__ if base.__dict__.get("_is_protocol", False)]
        members = {name for base in protocols for name in base.__dict__ if name[0] != "_"}
        return all(getattr_static(instance, name, None) is not None for name in members)


@runtime_checkable
class Source(Protocol, metaclass=StaticMembers):
    """Where pictures come from: a frozen component, told the split, pure in the generator.

    PictureFiles of different splits are different pictures.
    """

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every object name that can occur, most frequent (in training data) first."""
        ...

    @property
    def colours(self) -> tuple[str, ...]:
        """Every colour word that can occur; empty for a source that does not know colours."""
        ...

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of hallucinated caption this source has."""
        ...

    def corpus(self, split: Split, size: int, *, generator: torch.Generator) -> Corpus:
        """At most `size` pictures of a split, in an order that depends on the generator alone."""
        ...


@runtime_checkable
class Simulator(Source, Protocol):
    """A source that draws any number of scenes, with exact truth and places.

    `biased=True` draws objects that co-occur as in a language prior (training data); False draws
    them independently (clean and test data), so that a prior misleads. What is pretrained here,
    the `tiny` language model and the `vit` encoder, is pretrained on such scenes.
    """

    def scenes(self, size: int, *, biased: bool, generator: torch.Generator) -> tuple[Scene, ...]:
        """The truth alone, without pictures: cheap, for text-only pretraining."""
        ...

    def render(self, scenes: tuple[Scene, ...], generator: torch.Generator) -> Corpus:
        """Draw the pictures."""
        ...


@runtime_checkable
class Simulated(Source, Protocol):
    """A source made of simulators: one of them stands for it where scenes are drawn."""

    @property
    def simulator(self) -> Simulator:
        """What `tiny` and `vit` are pretrained on."""
        ...


def simulated(source: Simulator, split: Split, size: int, *, generator: torch.Generator) -> Corpus:
    """`Source.corpus` of a simulator: training scenes are biased, all others are not."""
    scenes = source.scenes(size, biased=split == "train", generator=generator)
    return source.render(scenes, generator)


def simulator(source: Source, asked_by: str, instead: str) -> Simulator:
    """The source, as one that draws scenes. Raises `ProblemError` that names what to use instead."""
    if isinstance(source, Simulated):
        return source.simulator
    if not isinstance(source, Simulator):
        raise ProblemError(
            f"{asked_by} is pretrained on scenes that a source draws, and source "
            f"{type(source).__name__} reads files; use {instead}"
        )
    return source


@runtime_checkable
class Encoder(Protocol):
    """A frozen vision encoder: a component, so nothing is kept in it between calls."""

    def encode(
        self, corpus: Corpus, source: Source, device: torch.device = CPU
    ) -> Generator[Progress, None, Float[Tensor, "scene token feature"]]:
        """Features per picture, float32 on CPU: `features = yield from encoder.encode(corpus, source)`.

        Weights and features are made once, on `device`, and cached on disk under a hash of what
        determines them; the generator yields its progress while it makes them, and returns the
        features (`models.features.encoded`: a map of the file).
        `source` is what an encoder that trains its own weights trains on (other scenes of it).
        """
        ...
