"""A checkpoint on disk and a cache, shared by the tests of the model and of the problem."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
import torch

from bilevel_problems.mllm_hft.models.gguf_folder import as_folder, packaged
from tests.problems.mllm_hft.packages import in_memory

WORDS = [
    "describe",
    "the",
    "picture",
    ".",
    "is",
    "there",
    "a",
    "cat",
    "dog",
    "?",
    "yes",
    "no",
    "one",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the module, so that what is pretrained is pretrained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory) -> Path:
    """A cache with the first layer of SmolLM2: ten seconds, once for all workers of a session."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_CACHE", str(root / "smollm2"))
        patch.setattr(numpy, "memmap", in_memory)
        for _ in as_folder(packaged(), 1):
            pass
    return root / "smollm2"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny random LLaVA with its tokenizer and picture processor, as `save_pretrained` writes."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", ",", "and", "are"]
    words += [*WORDS, "left", "right", "of", "above", "below", "an", "two", "three", "four", "five"]
    words += ["red", "green", "blue", "yellow", "purple", "white"]
    words += [w + s for s in ("", "s") for w in _shapes()] + ["crosses"]
    table = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            image_size=24, patch_size=8,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(table), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, eos_token_id=2, bos_token_id=1,
        ),
        image_token_index=3,
        vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size).save_pretrained(folder)
    return str(folder)


def _shapes() -> tuple[str, ...]:
    from bilevel_problems.mllm_hft.sources.shapes import Shapes

    return Shapes().vocabulary
