"""Photographs of animals, fruit, vehicles and tools on soft grounds: the source with real pictures.

The photographs are the stamps of Tux Paint (Debian package `tuxpaint-stamps-default`, GPL-2): cut
out by hand, with an alpha channel. They are read where the package put them and are not part of
this project. Names co-occur in pairs as in `shapes`; colours are not known.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import UInt8
from pydantic import Field, NonNegativeInt
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from bilevel.components import PathName, component
from bilevel.errors import RequirementError

from .packages import require
from .protocol import Corpus, Kind, Scene, Split, Thing, simulated
from .scenes import World

PACKAGE = "tuxpaint-stamps-default"
FOLDER = "/usr/share/tuxpaint/stamps"
PAIRS = (
    ("sheep", "dog"),
    ("apple", "banana"),
    ("horse", "cow"),
    ("car", "bus"),
    ("lion", "zebra"),
    ("guitar", "trumpet"),
    ("elephant", "giraffe"),
    ("hammer", "saw"),
    ("duck", "frog"),
    ("rabbit", "mouse"),
    ("kettle", "mug"),
    ("penguin", "dolphin"),
)
MAMMALS, FRUIT, MUSIC = "animals/mammals", "food/fruit", "hobbies/music"
PHOTOS: dict[str, tuple[str, ...]] = {
    "sheep": (f"{MAMMALS}/bovines/sheep", f"{MAMMALS}/bovines/sheep_lamb"),
    "dog": (f"{MAMMALS}/dogs/dog",),
    "apple": (f"{FRUIT}/apple_red", f"{FRUIT}/apple_fuji", f"{FRUIT}/apple_granny_smith"),
    "banana": (f"{FRUIT}/banana",),
    "horse": (f"{MAMMALS}/equines/horse",),
    "cow": (f"{MAMMALS}/bovines/cow", f"{MAMMALS}/bovines/cow_white"),
    "car": ("vehicles/auto/sedan", "vehicles/auto/beetle", "vehicles/auto/sportscar2"),
    "bus": ("vehicles/masstransit/green_korean_bus",),
    "lion": (f"{MAMMALS}/cats/lion", f"{MAMMALS}/cats/lion-2"),
    "zebra": (f"{MAMMALS}/equines/zebra",),
    "guitar": (
        f"{MUSIC}/string/guitar_classical",
        f"{MUSIC}/string/guitar2",
        f"{MUSIC}/string/guitar_electric",
    ),
    "trumpet": (f"{MUSIC}/brass/trumpet",),
    "elephant": (f"{MAMMALS}/elephant",),
    "giraffe": (f"{MAMMALS}/giraffe",),
    "hammer": ("household/tools/hammer",),
    "saw": ("household/tools/saw",),
    "duck": ("animals/birds/duck",),
    "frog": ("animals/amphibians/frog",),
    "rabbit": (f"{MAMMALS}/rodents/rabbit", f"{MAMMALS}/rodents/rabbit-2"),
    "mouse": (f"{MAMMALS}/rodents/mouse",),
    "kettle": ("household/kettle",),
    "mug": ("household/dishes/mug",),
    "penguin": ("animals/birds/penguin", "animals/birds/magellanic_penguin"),
    "dolphin": (f"{MAMMALS}/aquatic/dolphin",),
}
"""Photographs of each name, without ".png"; one is drawn at random for each object."""
GRID = 3
NOISE = 6.0
"""Standard deviation of the pixel noise, of 255."""


@component
class Photos:
    """Scenes of 24 photographed objects on a 3 × 3 board. A `Source` without colours.

    A thousand pictures take about two seconds on one core.
    """

    bias: Annotated[float, Field(ge=0, le=1)] = 0.9
    """How often a pair of objects comes whole in biased scenes."""
    pairing: NonNegativeInt = 0
    """Which objects are pairs: each number is another pairing of the same names."""
    invented: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training pictures whose author tells of an object that is not there, one that
    the bias leads to expect, in place of one that is."""
    pixels: Annotated[int, Field(ge=64)] = 128
    """Height and width of a picture."""
    folder: PathName = FOLDER
    """Where the stamps are."""

    @cached_property
    def _world(self) -> World:
        return World(PAIRS, (), self.bias, grid=GRID, most=5).paired(self.pairing)

    @cached_property
    def _cutouts(self) -> dict[str, list[Any]]:
        """Photographs cropped to what is opaque. Raises `RequirementError` if one is missing."""
        image = require("PIL.Image", "pillow")
        folder = os.path.expanduser(self.folder)
        paths = {name: [Path(folder, f"{p}.png") for p in PHOTOS[name]] for name in PHOTOS}
        missing = [path for found in paths.values() for path in found if not path.is_file()]
        if missing:
            raise RequirementError(
                f"{missing[0]}: not found ({len(missing)} photographs are missing); "
                f"apt-get install {PACKAGE}, or set source.folder to where its stamps are"
            )
        found: dict[str, list[Any]] = {}
        for name, files in paths.items():
            pictures = [image.open(path).convert("RGBA") for path in files]
            found[name] = [p.crop(p.getchannel("A").getbbox()) for p in pictures]
        return found

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self._world.names

    @property
    def colours(self) -> tuple[str, ...]:
        return ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("object", "relation", "count")

    def corpus(self, split: Split, size: int, *, generator: Generator) -> Corpus:
        corpus = simulated(self, split, size, generator=generator)
        if split != "train" or not self.invented:
            return corpus
        told = self._world.misdescribe(corpus.scenes, self.invented, generator)
        return replace(corpus, scenes=told)

    def scenes(self, size: int, *, biased: bool, generator: Generator) -> tuple[Scene, ...]:
        return self._world.scenes(size, biased=biased, generator=generator)

    def render(self, scenes: tuple[Scene, ...], generator: Generator) -> Corpus:
        images = torch.empty(len(scenes), 3, self.pixels, self.pixels, dtype=torch.uint8)
        for row, scene in enumerate(scenes):
            images[row] = self._draw(scene.things, generator)
        return Corpus(scenes, images)

    def _draw(
        self, things: tuple[Thing, ...], generator: Generator
    ) -> UInt8[Tensor, "3 height width"]:
        image = _ground(self.pixels, generator)
        for thing in things:
            choice, scale, mirror, light = torch.rand(4, generator=generator).tolist()
            cutouts = self._cutouts[thing.name]
            side = self.pixels / GRID * (0.95 + 0.25 * scale)
            picture = _resized(cutouts[int(choice * len(cutouts))], side)
            if mirror < 0.5:
                picture = picture.flip(2)
            _paste(image, picture[:3] * (0.8 + 0.4 * light), picture[3:] / 255, thing)
        image += NOISE * torch.randn(image.shape, generator=generator)
        return image.clamp(0, 255).to(torch.uint8)


def _ground(pixels: int, generator: Generator) -> Tensor:
    """Patches of light and of colour that run into each other."""
    tone = 70 + 110 * torch.rand(1, 1, 1, generator=generator)
    tint = 15 * torch.randn(3, 1, 1, generator=generator)
    spots = 14 * torch.randn(1, 3, 5, 5, generator=generator)
    return tone + tint + interpolate(spots, size=(pixels, pixels), mode="bicubic")[0]


def _resized(cutout: Any, side: float) -> Tensor:
    """The photograph with `side` pixels on its longer side, [red green blue alpha, height, width]."""
    scale = side / max(cutout.size)
    size = [max(1, round(length * scale)) for length in cutout.size]
    resized = cutout.resize(size)
    content = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return content.reshape(size[1], size[0], 4).permute(2, 0, 1).float()


def _paste(image: Tensor, colour: Tensor, cover: Tensor, thing: Thing) -> None:
    """Lay the photograph over the image, centred on the thing, wholly inside the picture."""
    _, height, width = colour.shape
    pixels = image.shape[-1]
    top = min(max(round(thing.y * pixels - height / 2), 0), pixels - height)
    left = min(max(round(thing.x * pixels - width / 2), 0), pixels - width)
    under = image[:, top : top + height, left : left + width]
    under += cover * (colour - under)
