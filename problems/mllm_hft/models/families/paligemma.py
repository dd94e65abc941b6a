"""PaliGemma: Beyer et al. (2024), arXiv:2407.07726. The picture and the prompt are a prefix that is
seen both ways; answers are causal. Positions begin at 1."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .family import Family, counted, linear_head
from .llava import LLAVA


def _positions(mask: Tensor, picture: slice, grid: Tensor | None) -> Tensor:
    return counted(mask, picture, grid) + 1


def _attention(
    mllm: Any,
    embeddings: Tensor,
    mask: Bool[Tensor, "row place"],
    prefix: Bool[Tensor, "row place"] | None,
) -> Any:
    """One block seen both ways, the rest causal; with and without a window where layers have one."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    # without data (the meta device) nothing is known of the mask: it is taken to have a picture
    if prefix is None or not (prefix.is_meta or bool(prefix.any())):
        return mask.long()
    config = mllm.config.get_text_config()
    given = {
        "config": config,
        "inputs_embeds": embeddings,
        "attention_mask": mask.long(),
        "past_key_values": None,
        "position_ids": None,
        "block_sequence_ids": torch.where(prefix, 0, -1),
    }
    full = create_causal_mask(**given)
    if getattr(config, "sliding_window", None) is None:
        return full
    return {
        "full_attention": full,
        "sliding_attention": create_sliding_window_causal_mask(**given),
    }


def _head(mllm: Any, states: Tensor) -> Tensor:
    logits = linear_head(mllm, states)
    cap = getattr(mllm.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


PALIGEMMA = Family(
    "model.language_model",
    "model.multi_modal_projector",
    LLAVA.arrange,
    positions=_positions,
    attention=_attention,
    head=_head,
    template="<image>{start}{prompt}\n",
)
