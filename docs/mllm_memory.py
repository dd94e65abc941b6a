"""The table of docs/mllm_memory.md: `python -m docs.mllm_memory` (two minutes, no weights needed).

The decoder's layers are alike, so what is saved is affine in their number: two models, of one and of two
layers, say what 32 hold.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from bilevel_problems.mllm_hft import formulations
from bilevel_problems.mllm_hft.formulations import FORMS, Formulation
from bilevel_problems.mllm_hft.losses import Negatives
from bilevel_problems.mllm_hft.memory import Footprint, footprint, spelled
from bilevel_problems.mllm_hft.models.adapters import add_lora
from bilevel_problems.mllm_hft.models.network import Network, parameters

KINDS, CAPTION, CONVERSATION, PLACES, FEATURE, LAYERS = 4, 40, 60, 576, 1024, 32


class Case(NamedTuple):
    """A line of the table."""

    formulation: Formulation
    weights: torch.dtype
    batch: int
    micro_batch: int | None = None


ROWS = (
    Case("two_variable", torch.bfloat16, 4),
    Case("two_variable", torch.bfloat16, 8),
    Case("two_variable", torch.float32, 32),
    Case("two_variable", torch.bfloat16, 32, 1),
    Case("two_variable", torch.bfloat16, 32, 4),
    Case("two_variable", torch.bfloat16, 32, 8),
    Case("weighted", torch.bfloat16, 2),
    Case("weighted", torch.bfloat16, 4),
    Case("weighted", torch.float32, 32),
    Case("weighted", torch.bfloat16, 32, 1),
    Case("weighted", torch.bfloat16, 32, 2),
    Case("weighted", torch.bfloat16, 32, 4),
    Case("weighted", torch.float32, 32, 1),
)


@cache
def llava(dtype: torch.dtype, layers: int) -> Network:
    """LLaVA-1.5-7B by its configuration but for its depth, without data; LoRA of rank 8, heads of 256."""
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
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
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


def measured(case: Case, layers: int) -> Footprint:
    """One lower step; the trained parts are float32."""
    network, form = llava(case.weights, layers), FORMS[case.formulation]
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
        return formulations.lower(
            form,
            network,
            at,
            batch,
            anchor=2.0,
            reference=reference,
            micro_batch=case.micro_batch,
        )

    frozen = {name: value for name, value in every.items() if name not in trained}
    return footprint(loss, frozen, trained, batches(case.batch))


def extrapolated(case: Case, layers: int = LAYERS) -> Footprint:
    """`measured` at `layers`, from 1 and 2 of them."""
    one, two = (vars(measured(case, depth)) for depth in (1, 2))
    return Footprint(**{n: one[n] + (layers - 1) * (two[n] - one[n]) for n in one})


def batches(size: int) -> dict[str, Any]:
    """Contrast and conversations, without data."""
    truth = torch.empty(size, size, dtype=torch.bool), torch.empty(size, KINDS, dtype=torch.bool)
    pictures = {"features": torch.empty(size, PLACES, FEATURE, device="meta")}
    lines = _texts(size, 1 + KINDS, CAPTION)
    talk = _texts(size, CONVERSATION)
    places = torch.empty(size, CONVERSATION, dtype=torch.long, device="meta")
    more = {
        "counted": talk["mask"],
        "places": places,
        "prefix": torch.empty(size, dtype=torch.long),
    }
    return {
        "contrast": {**pictures, **lines, "against": Negatives(*truth)},
        "task": {**pictures, **talk, **more},
    }


def _texts(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.empty(shape, dtype=torch.long, device="meta"),
        "mask": torch.empty(shape, dtype=torch.bool, device="meta"),
    }


def row(case: Case) -> str:
    """A line of the table."""
    found = extrapolated(case)
    kind = str(case.weights).removeprefix("torch.")
    sizes = (found.weights, found.graph, found.derivative, found.kept, found.of_second_order)
    told = (
        f"`{case.formulation}`",
        kind,
        case.batch,
        case.micro_batch or "–",
        *map(spelled, sizes),
    )
    return f"| {' | '.join(map(str, told))} |"


if __name__ == "__main__":
    print("\n".join(map(row, ROWS)))
