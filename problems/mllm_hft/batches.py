"""Splits of pictures with what is said about them, and batches drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from bilevel.errors import ProblemError

from .evaluation.evaluation_split import Captions, alike
from .losses import Choice, negatives
from .models import pictures
from .models.instructions import Rows, places
from .models.pictures import Pictures
from .queue import StartStates
from .sources.pictures import PictureFiles
from .sources.protocol import Corpus, Scene

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """A split that batches are drawn from."""

    pictures: Pictures
    dialogues: Rows
    captions: Captions
    picture: Int[Tensor, "scene"]
    """A number each picture: two scenes of one file have the same."""
    origin: Int[Tensor, "scene"] | None = None
    """The number of the part that each scene comes from; None where there are no parts."""
    drawn_from: Int[Tensor, "kept"] | None = None
    """The scenes that batches are drawn from, which are then of one part; None: all."""

    def draw(
        self, batch: int, stream: torch.Generator, *, described: bool = False
    ) -> Int[Tensor, "batch"]:
        """Scenes of a batch, as many from each origin as from another, but for one.

        Of those with a caption alone where `described`; raises `ProblemError` where there is none.
        """
        pools = self._described if described else self._places
        if not pools:
            raise ProblemError(
                "no training picture has a caption, which the contrast is about; give captions, or "
                "use a formulation without a contrast (task_only, task_weighted)"
            )
        if len(pools) == 1:
            return pools[0][drawn(len(pools[0]), batch, stream)]
        each, more = divmod(batch, len(pools))
        # where the batch cannot be divided evenly, chance says which origins give one more
        extra = torch.randperm(len(pools), generator=stream)[:more].tolist()
        return torch.cat(
            [place[drawn(len(place), each + (i in extra), stream)] for i, place in enumerate(pools)]
        )

    @cached_property
    def _places(self) -> list[Int[Tensor, "scene"]]:
        """The scenes of each origin that batches are drawn from; sought once, as every batch asks."""
        if self.drawn_from is not None:
            return [self.drawn_from]
        if self.origin is None:
            return [torch.arange(len(self.pictures))]
        return [(self.origin == i).nonzero()[:, 0] for i in self.origin.unique().tolist()]

    @cached_property
    def _described(self) -> list[Int[Tensor, "scene"]]:
        """Those of `_places` with a true caption, where an origin has any."""
        found = [place[self.captions.described[place]] for place in self._places]
        return [place for place in found if len(place)]

    def of(self, index: Int[Tensor, "batch"]) -> Batch:
        """The pictures, and the origins if there are any."""
        origin = {} if self.origin is None else {"origin": self.origin[index]}
        return {**self.pictures.take(index), **origin}


def drawn(size: int, batch: int, stream: torch.Generator) -> Int[Tensor, "batch"]:
    """Which of `size` scenes make a batch: different ones where there are enough of them.

    A batch depends on the stream alone and not on those before it, which keeps resuming exact.
    """
    if batch > size:
        return torch.randint(size, (batch,), generator=stream)
    return torch.randperm(size, generator=stream)[:batch]


def task_batch(data: Data, size: int, stream: torch.Generator) -> Batch:
    """Pictures and conversations about them."""
    index = data.draw(size, stream)
    return {**data.of(index), **data.dialogues.take(index)}


def others(
    described: Bool[Tensor, "scene"],
    taken: Int[Tensor, "batch"],
    number: int,
    stream: torch.Generator,
) -> Int[Tensor, "queued"]:
    """Different scenes that have a caption, none of them `taken`."""
    left = described.index_fill(0, taken, False).nonzero()[:, 0]
    if number > len(left):
        raise ProblemError(
            f"problem.queue = {number}: beside a batch of {len(taken)}, {len(left)} of "
            f"{int(described.sum())} training pictures with a caption are left; must be at most "
            f"{len(left)}"
        )
    return left[torch.randperm(len(left), generator=stream)[:number]]


def contrast_batch(
    data: Data,
    size: int,
    stream: torch.Generator,
    choice: Choice = "own",
    queue: int = 0,
    states: StartStates | None = None,
) -> dict[str, Any]:
    """Pictures with their numbers, each with its caption and hallucinated captions.

    A picture without a caption is in none: its hallucinated captions have no true one beside them.

    `against` says what of the batch is a negative of which picture. With `states` there is a
    `queue` of so many other pictures.
    """
    index = data.draw(size, stream, described=True)
    picture, lines = data.picture[index], data.captions.take(index)
    against = negatives(picture, data.captions.line[index], lines["present"], choice)
    found = {**data.of(index), **lines, "picture": picture, "against": against}
    if states is None:
        return found
    more = others(data.captions.described, index, queue, stream)
    other, true = data.picture[more], data.captions.line[:, 0]
    apart = (picture[:, None] != other) & (true[index][:, None] != true[more])
    kept = {**states.of(more), "picture": other}
    return {**found, "queue": kept, "against": replace(against, queue=apart)}


def joined(batches: Sequence[Batch]) -> Batch:
    """Task batches as one, rows padded to the widest; the mask rules the padding out.

    Rows without an origin get −1.
    """
    width = max(batch["ids"].shape[1] for batch in batches)
    rows = {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in batches])
        for name in ("ids", "mask", "counted")
    }
    rows["places"] = places(rows["counted"])
    rows["prefix"] = torch.cat([batch["prefix"] for batch in batches])
    if any("origin" in batch for batch in batches):
        none = [torch.full((len(batch["ids"]),), -1) for batch in batches]
        each = [batch.get("origin", no) for batch, no in zip(batches, none, strict=True)]
        rows["origin"] = torch.cat(each)
    return {**pictures.joined(batches), **rows}


def numbered(corpus: Corpus) -> Int[Tensor, "scene"]:
    """A number each picture; scenes about one file share it."""
    if not isinstance(corpus.images, PictureFiles):
        return torch.arange(len(corpus.scenes))
    return alike(corpus.images.files)


def origins(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """Names of the parts that scenes come from, in order of appearance; () where there is one."""
    found = tuple(dict.fromkeys(scene.origin for scene in scenes))
    return found if len(found) > 1 else ()


def origin_numbers(scenes: Sequence[Scene]) -> Int[Tensor, "scene"] | None:
    """The place of each scene's origin among `origins`."""
    return alike(scene.origin for scene in scenes) if origins(scenes) else None
