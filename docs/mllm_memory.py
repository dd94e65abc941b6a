"""The table of docs/mllm_memory.md: `python -m docs.mllm_memory` (half a minute, no weights needed)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from bilevel_problems.mllm_hft import formulations
from bilevel_problems.mllm_hft.formulations import FORMS, Formulation
from bilevel_problems.mllm_hft.losses import Negatives
from bilevel_problems.mllm_hft.memory import Footprint, footprint, spelled
from bilevel_problems.mllm_hft.models.adapters import add_lora
from bilevel_problems.mllm_hft.models.network import Network, parameters

KINDS, CAPTION, CONVERSATION, PLACES, FEATURE = 4, 40, 60, 576, 1024
ROWS: tuple[tuple[Formulation, torch.dtype, int], ...] = (
    ("two_variable", torch.bfloat16, 2),
    ("two_variable", torch.bfloat16, 4),
    ("two_variable", torch.bfloat16, 8),
    ("two_variable", torch.float32, 32),
    ("weighted", torch.bfloat16, 2),
    ("weighted", torch.bfloat16, 4),
)


@cache
def llava(dtype: torch.dtype) -> Network:
    """LLaVA-1.5-7B by its configuration, without data, with LoRA of rank 8 and heads of 256."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    sight = CLIPVisionConfig(
        hidden_size=FEATURE, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32,
    )  # fmt: skip
    config = LlavaConfig(vision_config=sight, text_config=text)
    with torch.device("meta"):
        made = LlavaForConditionalGeneration._from_config(
            config, attn_implementation="eager", dtype=dtype
        )
        network = Network(made, before=(1,), end=2, embedding=256)
        add_lora(network, 8)
    return network


def measured(formulation: Formulation, dtype: torch.dtype, batch: int) -> Footprint:
    """One lower step; the trained parts are float32."""
    network, form = llava(dtype), FORMS[formulation]
    scalars = {str(n): v for n, v in formulations.start_scalars(0.5, KINDS, []).items()}
    trained = {
        name: value.float()
        for part in form.lower
        if part in ("projector", "heads", "lora")
        for name, value in parameters(network, part).items()
    }
    reference = parameters(network, "projector")
    every = {**dict(network.named_parameters()), **dict(network.named_buffers()), **scalars}

    def loss(at: Any, batch: Any) -> torch.Tensor:
        return formulations.lower(form, network, at, batch, anchor=2.0, reference=reference)

    frozen = {name: value for name, value in every.items() if name not in trained}
    return footprint(loss, frozen, trained, batches(batch))


def batches(size: int) -> dict[str, Any]:
    """Contrast and conversations, without data."""
    truth = torch.empty(size, size, dtype=torch.bool), torch.empty(size, KINDS, dtype=torch.bool)
    pictures = {"features": torch.empty(size, PLACES, FEATURE, device="meta")}
    lines = _texts(size, 1 + KINDS, CAPTION)
    talk = _texts(size, CONVERSATION)
    more = {"counted": talk["mask"], "prefix": torch.empty(size, dtype=torch.long)}
    return {
        "contrast": {**pictures, **lines, "against": Negatives(*truth)},
        "task": {**pictures, **talk, **more},
    }


def _texts(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.empty(shape, dtype=torch.long, device="meta"),
        "mask": torch.empty(shape, dtype=torch.bool, device="meta"),
    }


def row(formulation: Formulation, dtype: torch.dtype, batch: int) -> str:
    """A line of the table."""
    found = measured(formulation, dtype, batch)
    kind = str(dtype).removeprefix("torch.")
    sizes = (found.weights, found.graph, found.derivative)
    return f"| `{formulation}` | {kind} | {batch} | {' | '.join(map(spelled, sizes))} |"


if __name__ == "__main__":
    print("\n".join(row(*case) for case in ROWS))
