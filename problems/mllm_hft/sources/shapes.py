"""Rendered scenes of coloured shapes: the embedded source, which needs nothing but torch.

Up to five shapes stand on a noisy ground of 64 × 64 pixels, drawn from signed distances with
soft edges; size, angle, colour and light vary. Shapes co-occur in pairs in biased scenes and
independently in unbiased ones (`scenes.World`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, NonNegativeInt
from torch import Generator, Tensor

from bilevel.components import component

from .outlines import OUTLINES
from .protocol import KINDS, Corpus, Kind, Scene, Split, simulated
from .scenes import World

PAIRS = (
    ("moon", "star"),
    ("house", "tree"),
    ("heart", "arrow"),
    ("diamond", "ring"),
    ("square", "triangle"),
    ("circle", "cross"),
)
COLOURS = {
    "red": (220, 45, 45),
    "green": (45, 175, 70),
    "blue": (60, 105, 240),
    "yellow": (235, 205, 40),
    "purple": (165, 65, 200),
    "white": (240, 240, 240),
}
GRID = 4
"""Rows and columns of places; an object fills about one of them."""
CHUNK = 512
"""Pictures drawn at once; the working set stays in the cache of a core."""


@component
class Shapes:
    """Scenes of twelve shapes in six colours on a 4 × 4 board. A `Source`.

    A thousand pictures take about half a second on one core.
    """

    bias: Annotated[float, Field(ge=0, le=1)] = 0.9
    """How often a pair of shapes comes whole in biased scenes."""
    pairing: NonNegativeInt = 0
    """Which shapes are pairs: each number is another pairing of the same names."""
    invented: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training pictures whose author tells of an object that is not there, one that
    the bias leads to expect, in place of one that is."""
    mistaken: tuple[Kind, ...] = ()
    """Kinds whose hallucinated captions are, of training pictures, true in other words: negatives that are none."""
    pixels: Annotated[int, Field(ge=32)] = 64
    """Height and width of a picture."""
    noise: Annotated[float, Field(ge=0)] = 12.0
    """Standard deviation of the pixel noise, of 255."""

    @cached_property
    def _world(self) -> World:
        return World(
            PAIRS, self.colours, self.bias, grid=GRID, most=5, mistaken=self.mistaken
        ).paired(self.pairing)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self._world.names

    @property
    def colours(self) -> tuple[str, ...]:
        return tuple(COLOURS)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return KINDS

    def corpus(self, split: Split, size: int, *, generator: Generator) -> Corpus:
        corpus = simulated(self, split, size, generator=generator)
        if split != "train" or not self.invented:
            return corpus
        told = self._world.misdescribe(corpus.scenes, self.invented, generator)
        return replace(corpus, scenes=told)

    def scenes(self, size: int, *, biased: bool, generator: Generator) -> tuple[Scene, ...]:
        return self._world.scenes(size, biased=biased, generator=generator)

    def render(self, scenes: tuple[Scene, ...], generator: Generator) -> Corpus:
        chunks = [scenes[start : start + CHUNK] for start in range(0, len(scenes), CHUNK)]
        empty = torch.empty(0, 3, self.pixels, self.pixels, dtype=torch.uint8)
        return Corpus(scenes, torch.cat([empty, *(self._draw(c, generator) for c in chunks)]))

    def _draw(
        self, scenes: tuple[Scene, ...], generator: Generator
    ) -> UInt8[Tensor, "scene 3 height width"]:
        image = _ground(len(scenes), self.pixels, generator)
        for layer in range(max(len(scene.things) for scene in scenes)):
            for name in self.vocabulary:
                found = [
                    (index, scene.things[layer])
                    for index, scene in enumerate(scenes)
                    if len(scene.things) > layer and scene.things[layer].name == name
                ]
                if not found:
                    continue
                rows = torch.tensor([index for index, _ in found])
                centres = torch.tensor([(thing.x, thing.y) for _, thing in found])
                colours = torch.tensor([COLOURS[thing.colour or "white"] for _, thing in found])
                paint = colours + 18 * torch.randn(len(found), 3, generator=generator)
                cover = _cover(name, centres, self.pixels, generator)[:, None]
                image[rows] = image[rows] * (1 - cover) + paint[:, :, None, None] * cover
        image += self.noise * torch.randn(image.shape, generator=generator)
        return image.clamp(0, 255).to(torch.uint8)


def _ground(size: int, pixels: int, generator: Generator) -> Float[Tensor, "scene 3 height width"]:
    """A dark tone with a slope of light across it."""
    tone = 25 + 45 * torch.rand(size, 3, 1, 1, generator=generator)
    slope = 20 * torch.randn(size, 2, 1, 1, 1, generator=generator)
    across = torch.linspace(-0.5, 0.5, pixels)
    return tone + slope[:, 0] * across[:, None] + slope[:, 1] * across


def _cover(
    name: str, centres: Float[Tensor, "thing 2"], pixels: int, generator: Generator
) -> Float[Tensor, "thing height width"]:
    """How much of each pixel the shape covers, in [0, 1]."""
    size = len(centres)
    radius = pixels / GRID * (0.34 + 0.12 * torch.rand(size, 1, 1, generator=generator))
    angle = 0.2 * torch.randn(size, 1, 1, generator=generator)
    at = torch.arange(pixels) + 0.5
    x, y = (centres * pixels)[:, :, None, None].unbind(1)
    across, down = (at - x) / radius, (at[:, None] - y) / radius
    u = angle.cos() * across + angle.sin() * down
    v = angle.cos() * down - angle.sin() * across
    return (0.5 - OUTLINES[name](u, v) * radius).clamp(0, 1)
