"""Encoded pictures: what the projector takes, and what stands at each place of a picture's block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEATURE, NEWLINE, PADDING = -1, -2, -3
"""What `layout` says of a place beside the id of a token (≥ 0): a projected feature, the model's
newline vector, nothing."""


@dataclass(frozen=True)
class Picture:
    """One picture; see `Pictures`."""

    features: Float[Tensor, "place feature"]
    layout: Int[Tensor, "place"] | None = None
    grid: Int[Tensor, "place 3"] | None = None


@dataclass(frozen=True)
class Pictures:
    """A block of places a picture, padded to the widest."""

    features: Float[Tensor, "scene place feature"]
    """0 where a place is not a feature."""
    layout: Int[Tensor, "scene place"] | None = None
    """None: every place is a feature."""
    grid: Int[Tensor, "scene place 3"] | None = None
    """Time, row and column, where positions have three axes."""

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: Int[Tensor, "batch"] | slice) -> dict[str, Tensor]:
        """Some pictures as a batch, cut to the widest of them."""
        if self.layout is None:
            width = self.features.shape[1]
        else:
            width = int((self.layout[index] != PADDING).sum(1).max())
        return {name: value[index][:, :width] for name, value in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        fields = {"features": self.features, "layout": self.layout, "grid": self.grid}
        return {name: value for name, value in fields.items() if value is not None}


def stack(pictures: Sequence[Picture]) -> Pictures:
    """Pictures side by side; `layout` only where some place is not a feature."""
    width = max(len(picture.features) for picture in pictures)
    layouts = [
        torch.full((len(p.features),), FEATURE) if p.layout is None else p.layout for p in pictures
    ]
    layout = torch.stack([widened(value, width, PADDING) for value in layouts])
    grids = [widened(p.grid, width, 0) for p in pictures if p.grid is not None]
    return Pictures(
        torch.stack([widened(picture.features, width, 0) for picture in pictures]),
        None if (layout == FEATURE).all() else layout,
        torch.stack(grids) if grids else None,
    )


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of pictures as one."""
    rows = [
        Picture(*(batch[n][i] if n in batch else None for n in ("features", "layout", "grid")))  # pyright: ignore[reportArgumentType]
        for batch in batches
        for i in range(len(batch["features"]))
    ]
    return stack(rows).tensors()


def widened(value: Tensor, width: int, fill: int) -> Tensor:
    """The rows of `value`, and behind them as many of `fill` as make `width` rows."""
    missing = value.new_full((width - len(value), *value.shape[1:]), fill)
    return torch.cat([value, missing])
