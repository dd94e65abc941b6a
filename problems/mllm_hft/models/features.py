"""Features of pictures, encoded once into a file of the cache and read from it as they are asked for.

What a vision tower gives is 2 MiB a picture, so that it is never held: encoded pictures go into a
file without a name, from there into the cache, padded to the widest, and the features that a run
works with are a map of that file. Pages that memory has no room for are read again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from bilevel.events import Progress

from ..memory import rows_at_a_time, working_set
from . import cache
from .cache import Streamed
from .pictures import Picture, Pictures, stack, widened

KIND = "features"


def encoded(
    key: Mapping[str, Any],
    total: int,
    encode: Callable[[slice], Sequence[Picture]],
    *,
    most: int,
    held: int,
    device: torch.device,
) -> Generator[Progress, None, Pictures]:
    """Blocks of `total` pictures, on CPU, kept under `key`; `encode(part)` makes those of a part.

    As many at a time as `device` has memory for beside the `held` bytes, `most` at most: what one
    picture takes is measured, at the price of encoding the first one twice. A process that is
    stopped leaves nothing that is taken for whole; a file that is damaged is made again.

    Raises `RequirementError` where the cache cannot be written.
    """
    found = cache.load(KIND, key)
    if found is None:
        with cache.room_for(KIND, key) as folder:
            spool = _Spool(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        with spool:
            _, each = working_set(lambda: encode(slice(0, 1)))
            done = 0
            while done < total:
                part = slice(done, min(done + rows_at_a_time(each, held, device, most), total))
                pictures, taken = working_set(lambda part=part: encode(part))
                each = max(each, taken // len(pictures))
                with cache.room_for(KIND, key):
                    spool.add(pictures)
                done = part.stop
                yield Progress("picture features", done, total)
            cache.save(KIND, key, spool.tensors())
        found = cache.load(KIND, key)
        assert found is not None, "what was written a moment ago"
    return Pictures(**found)


class _Spool:
    """Features one after the other in a file, without padding; layout and grid stay in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._others: list[Picture] = []
        self._like = torch.empty(0)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, pictures: Sequence[Picture]) -> None:
        """More of them."""
        for picture in pictures:
            self._like = picture.features[:0].clone()
            self._file.write(cache.content(picture.features))
            empty = self._like.new_empty(len(picture.features), 0)
            self._others.append(Picture(empty, picture.layout, picture.grid))

    def tensors(self) -> dict[str, Tensor | Streamed]:
        """The fields of `Pictures`."""
        others = stack(self._others).tensors()
        shape = (*others.pop("features").shape[:2], *self._like.shape[1:])
        return {"features": Streamed(self._like.dtype, shape, self._padded(shape[1])), **others}

    def _padded(self, width: int) -> Iterator[Tensor]:
        self._file.seek(0)
        each = self._like.shape[1:].numel() * self._like.element_size()
        for picture in self._others:
            read = bytearray(self._file.read(len(picture.features) * each))
            features = torch.frombuffer(read, dtype=self._like.dtype)
            yield widened(features.reshape(-1, *self._like.shape[1:]), width, 0)
