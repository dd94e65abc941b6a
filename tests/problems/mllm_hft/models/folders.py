"""Folders of tiny models of each family, as transformers' own classes write them.

The tokenizer is the LLaMA-like sentencepiece one that the package mistral-common holds: one with a
word an id would hide faults of white space, of answers and of embeddings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MARKS = [
    "<image>", "<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
]  # fmt: skip

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "PICTURE{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}"
    "<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS = (
    "<s>{% for m in messages %}{{ m.role | capitalize }}:{% if m.content[0].type != 'image' %} {% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def sentencepiece(folder: Path) -> Any:
    """The tokenizer with the marks of every family, a start token put before every text."""
    package = pytest.importorskip("mistral_common", reason="holds a LLaMA-like tokenizer")
    pytest.importorskip("sentencepiece", reason="reads the tokenizer's model file")
    transformers = pytest.importorskip("transformers")
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True, exist_ok=True)
    model = Path(package.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    found = transformers.LlamaTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    found.add_special_tokens({"additional_special_tokens": MARKS})
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return found


def _save(folder: Path, config: Any, tokenizer: Any, processor: Any, chat: str | None) -> Path:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # fresh weights are so small that every answer is near to every other
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    if chat is not None:
        tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _id(tokenizer: Any, mark: str) -> int:
    return tokenizer.convert_tokens_to_ids(mark)


def _text(tokenizer: Any, kind: str = "LlamaConfig", **options: Any) -> Any:
    import transformers

    given = {**TEXT, "vocab_size": len(tokenizer), **options}
    return getattr(transformers, kind)(**given)


def llava(folder: Path, chat: str | None = VICUNA, text: Any = None) -> Path:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = sentencepiece(folder)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=text or _text(tokenizer),
        image_token_index=_id(tokenizer, "<image>"),
    )
    size = {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    return _save(folder, config, tokenizer, processor, chat)


def llava_next(folder: Path) -> Path:
    import transformers
    from transformers import LlavaNextImageProcessorPil

    tokenizer = sentencepiece(folder)
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=_text(tokenizer, "MistralConfig", sliding_window=None),
        image_token_index=_id(tokenizer, "<image>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
    )
    return _save(folder, config, tokenizer, processor, VICUNA)


def _qwen(folder: Path, config_class: str, vision: dict[str, Any]) -> Path:
    import transformers
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = sentencepiece(folder)
    mark = {name: _id(tokenizer, name) for name in MARKS}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = getattr(transformers, config_class)(
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        image_token_id=mark["<image>"],
        video_token_id=mark["<pad>"],
        vision_start_token_id=mark["<|vision_start|>"],
        vision_end_token_id=mark["<|vision_end|>"],
    )
    config.eos_token_id = config.text_config.eos_token_id = mark["<|im_end|>"]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
    chat = CHATML.replace("PICTURE", "<|vision_start|><image><|vision_end|>")
    return _save(folder, config, tokenizer, processor, chat)


def qwen2_vl(folder: Path) -> Path:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen(folder, "Qwen2VLConfig", vision)


def qwen2_5_vl(folder: Path) -> Path:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(folder, "Qwen2_5_VLConfig", vision)


def paligemma(folder: Path) -> Path:
    import transformers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = sentencepiece(folder)
    config = transformers.PaliGemmaConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32},
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8},
        image_token_index=_id(tokenizer, "<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    processor.image_seq_length = 4
    return _save(folder, config, tokenizer, processor, None)


def _idefics(folder: Path, config_class: str, processor_class: str) -> Path:
    import transformers

    tokenizer = sentencepiece(folder)
    config = getattr(transformers, config_class)(
        vision_config=TOWER,
        text_config=_text(tokenizer),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    config.text_config.eos_token_id = _id(tokenizer, "<end_of_utterance>")
    processor = getattr(transformers, processor_class)(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    return _save(folder, config, tokenizer, processor, IDEFICS)


def idefics3(folder: Path) -> Path:
    return _idefics(folder, "Idefics3Config", "Idefics3ImageProcessorPil")


def smolvlm(folder: Path) -> Path:
    return _idefics(folder, "SmolVLMConfig", "SmolVLMImageProcessorPil")


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}
