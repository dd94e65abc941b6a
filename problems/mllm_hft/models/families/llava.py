"""LLaVA 1.5: Liu et al. (2023), arXiv:2310.03744. As many places for every picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..pictures import Picture
from ..tokenizer import Tokenizer
from .family import Family


def _arrange(
    mllm: Any, taken: Tensor, inputs: Mapping[str, Any], tokenizer: Tokenizer
) -> list[Picture]:
    return [Picture(features) for features in taken]


LLAVA = Family("model.language_model", "model.multi_modal_projector", _arrange)
