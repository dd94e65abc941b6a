"""LLaVA-NeXT (1.6): the picture and its tiles, rows of tiles ended by a learned newline.

How many places a picture has depends on its size. The newline vector stays frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..pictures import FEATURE, NEWLINE, Picture
from ..tokenizer import Tokenizer
from .family import Family


def _arrange(
    mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Picture]:
    """transformers' own packing; NaN for the newline shows where it is put."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = mllm.config, inputs["image_sizes"]
    tiles = [
        image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        for size in sizes
    ]
    packed, _ = mllm.model.pack_image_features(
        taken.split(tiles),
        sizes,
        config.vision_feature_select_strategy,
        image_newline=taken.new_full(taken.shape[-1:], math.nan),
    )
    found = []
    for features in packed:
        is_newline = features.isnan().all(1)
        layout = torch.where(is_newline, NEWLINE, FEATURE)
        found.append(Picture(features.masked_fill(is_newline[:, None], 0), layout))
    return found


LLAVA_NEXT = Family("model.language_model", "model.multi_modal_projector", _arrange)
