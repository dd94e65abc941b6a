"""Qwen2-VL: Wang et al. (2024), arXiv:2409.12191; Qwen2.5-VL: Bai et al. (2025), arXiv:2502.13923.

Pictures of any size; positions have three axes, time, row and column, and text goes on behind the
larger of the picture's height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..pictures import Picture
from ..tokenizer import Tokenizer
from .family import Family


def _arrange(
    mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Picture]:
    side = mllm.config.vision_config.spatial_merge_size
    groups = taken.reshape(-1, side * side * taken.shape[-1])
    grids = inputs["image_grid_thw"]
    sizes = [int(grid.prod()) // side**2 for grid in grids]
    return [
        Picture(features, grid=_grid(grid, side))
        for features, grid in zip(groups.split(sizes), grids, strict=True)
    ]


def _arrange_windows(
    mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Picture]:
    """2.5: the tower orders groups of patches by attention window; undone before the rest."""
    from transformers.vision_utils import get_vision_window_index

    visual = mllm.model.visual
    order, _ = get_vision_window_index(
        inputs["image_grid_thw"],
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
    )
    groups = taken.reshape(len(order), -1)[order.argsort().to(taken.device)]
    return _arrange(mllm, groups.reshape(-1, taken.shape[-1]), inputs, tokenizer)


def _grid(grid: Int[Tensor, "3"], side: int) -> Int[Tensor, "place 3"]:
    time, rows, columns = grid.tolist()
    axes = [torch.arange(n) for n in (time, rows // side, columns // side)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _project(merger: Any, features: Tensor) -> Tensor:
    """The merger takes patches one by one and joins each side² of them."""
    width = merger.ln_q.weight.shape[0]
    return merger(features.reshape(-1, width)).reshape(*features.shape[:-1], -1)


def _positions(mask: Tensor, picture: slice, grid: Tensor | None) -> Int[Tensor, "3 row place"]:
    """Text: the same number on each axis; the picture: where it begins plus its grid."""
    places = mask.long()
    if grid is None:
        return places.cumsum(1).sub(1).clamp_min(0).expand(3, -1, -1)
    inside = grid * places[:, picture, None]
    extent = inside.flatten(1).amax(1) + 1
    front = places[:, : picture.start].sum(1)
    behind = (front + extent)[:, None] + places[:, picture.stop :].cumsum(1) - 1
    text = torch.cat([places[:, : picture.start].cumsum(1) - 1, behind], dim=1)
    rows = text.expand(3, -1, -1)
    seen = (front[:, None, None] + inside).permute(2, 0, 1)
    return torch.cat([rows[..., : picture.start], seen, rows[..., picture.start :]], dim=2)


QWEN2_VL = Family(
    "model.language_model",
    "model.visual.merger",
    _arrange,
    project=_project,
    positions=_positions,
)
QWEN2_5_VL = replace(QWEN2_VL, arrange=_arrange_windows)
