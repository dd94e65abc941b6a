"""Picture files of any size and mode, opened when they are asked for and not before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import UInt8
from torch import Tensor

from bilevel.errors import ProblemError

from .packages import require

Picture = UInt8[Tensor, "3 height width"]


@dataclass(frozen=True)
class PictureFiles:
    """Files in order, as red, green, blue bytes.

    `pictures[i]` reads one; a slice reads some, as a list of tensors, or as one tensor where
    `pixels` makes all of one size. Equal instances hold equal pictures: a file that was changed
    has another stamp, so that what is cached under this value is made again.
    """

    files: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    """Bytes and time of the last change (ns) of each file."""
    pixels: int | None = None
    """Height and width to which the shorter side is scaled, and the middle is cut out; None: as is."""
    at: tuple[object, ...] = field(default=(), compare=False, repr=False)
    """What write themselves as the file and line that name each; () where none does."""
    reader: int = 2
    """Raised when `read_picture` gives other pictures of the same files."""

    @classmethod
    def of(
        cls, files: Sequence[Path], pixels: int | None = None, at: Sequence[object] = ()
    ) -> PictureFiles:
        """Of files that are there. Only their sizes and times are read."""
        stats = [file.stat() for file in files]
        stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return cls(tuple(map(str, files)), stamps, pixels, tuple(at))

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Picture]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Any: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return read_picture(self.files[index], self.pixels, self.at[index] if self.at else "")
        found = [self[i] for i in range(len(self))[index]]
        if self.pixels is None:
            return found
        return torch.stack(found) if found else torch.empty(self.shape, dtype=torch.uint8)[:0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As a tensor's. Raises `ProblemError` where pictures are of many sizes."""
        if self.pixels is None:
            raise ProblemError(
                "this encoder needs pictures of one size, and these are read as they come; "
                "set source.pixels, for example to 224"
            )
        return len(self), 3, self.pixels, self.pixels


def read_picture(file: str, pixels: int | None = None, at: object = "") -> Picture:
    """The picture upright as a viewer shows it; 16 bits of grey scaled to 8.

    Errors begin with `at`, the place that names the file.

    Raises `ProblemError` for what is not a picture, for one whose pixels are 32-bit numbers, and for
    one of more than twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 million pixels.
    """
    image = require("PIL.Image", "pillow")
    operations = require("PIL.ImageOps", "pillow")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)  # it is read
            with image.open(file) as opened:
                upright = operations.exif_transpose(opened)
                picture = _shallow(upright, opened.format, _said(file, at)).convert("RGB")
    except image.DecompressionBombError as error:
        what = str(error).partition(",")[0]
        raise ProblemError(
            f"{_said(file, at)} is too large a picture ({what}); make it smaller, as models do with every picture, "
            "or leave it out"
        ) from error
    except ProblemError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ProblemError(f"{_said(file, at)} cannot be read as a picture ({error})") from error
    if pixels is not None:
        picture = operations.fit(picture, (pixels, pixels))
    content = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return content.reshape(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _said(file: str, at: object) -> str:
    return f"{at}: the file {file}" if str(at) else f"{file}:"


def _shallow(picture: Any, written: str | None, said: str) -> Any:
    """With eight bits a channel: Pillow cuts deeper grey at 255, which leaves it all but white."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    if picture.mode == "F" or (picture.mode == "I" and written not in ("PNG", "PPM")):
        raise ProblemError(
            f"{said} has 32-bit numbers for pixels, and which of them is white is not said; "
            "write it with 8 or 16 bits a pixel"
        )
    return picture.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")
