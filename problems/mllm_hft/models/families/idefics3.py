"""Idefics3: Laurençon et al. (2024), arXiv:2408.12637; SmolVLM: Marafioti et al. (2025),
arXiv:2504.05299. A picture and its tiles, each named by tokens that stand between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ProblemError

from ..pictures import FEATURE, Picture
from ..tokenizer import Tokenizer
from .family import Family

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


def _arrange(
    mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Picture]:
    tile, token = taken.shape[-2], mllm.config.image_token_id
    features = taken.reshape(-1, taken.shape[-1])
    found = []
    for (rows,), (columns,) in zip(inputs["rows"], inputs["cols"], strict=True):
        block = _block(tokenizer, token, tile, rows, columns)
        ids = torch.tensor(block, device=taken.device)
        is_feature = ids == token
        count = int(is_feature.sum())
        if len(features) < count:
            raise ProblemError(
                f"a picture of {rows} × {columns} tiles has fewer features than places: a tile "
                "that is all grey is left out by this family; change the picture"
            )
        places = features.new_zeros(len(ids), features.shape[1])
        places[is_feature.to(places.device)] = features[:count]
        features = features[count:]
        found.append(Picture(places, torch.where(is_feature, FEATURE, ids)))
    return found


def _block(tokenizer: Tokenizer, token: int, tile: int, rows: int, columns: int) -> list[int]:
    """Ids of a picture's block as the family's processor writes it, tile by tile, then the whole."""
    around = tokenizer.encode(AROUND)
    ids: list[int] = []
    for row in range(rows):
        for column in range(columns):
            name = tokenizer.encode(f"<row_{row + 1}_col_{column + 1}>", around[-1])
            ids += [*around, *name, *[token] * tile]
        last = "\n\n" if row == rows - 1 else "\n"
        ids += tokenizer.encode(last, token, around[-1])
    return [*ids, *around, *tokenizer.encode(WHOLE, around[-1]), *[token] * tile, *around]


IDEFICS3 = Family(
    "model.text_model",
    "model.connector",
    _arrange,
    last="modality_projection",
    project=lambda connector, features: connector.modality_projection(features),
    options={"return_row_col_info": True},
    nested=True,
)
