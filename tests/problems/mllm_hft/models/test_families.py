"""Each family on a tiny folder: what it sees, reads and says is what transformers' own model does."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel_problems.mllm_hft.models.adapters import add_lora, start_lora
from bilevel_problems.mllm_hft.models.families import FAMILIES, family_of
from bilevel_problems.mllm_hft.models.instructions import before, conversations, prompt_ids
from bilevel_problems.mllm_hft.models.loading import Folder, read
from bilevel_problems.mllm_hft.models.network import Network, call, parameters, start_heads
from bilevel_problems.mllm_hft.models.pictures import FEATURE, NEWLINE, PADDING, Pictures, stack

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

SIZES = [(60, 100), (120, 80), (56, 56)]
EXACT = {"rtol": 1e-4, "atol": 1e-5}


class Scene(NamedTuple):
    found: Folder
    network: Network
    images: list[torch.Tensor]
    pictures: Pictures


@pytest.fixture(scope="module")
def scene(folder):
    @cache
    def get(family: str) -> Scene:
        found = read(str(folder(family)), template=None, adapter="merge", dtype="auto")
        network = Network(
            found.mllm,
            before=before(found.tokenizer, found.template),
            end=found.tokenizer.end,
            ends=found.tokenizer.ends,
            embedding=8,
        )
        start_heads(network, torch.Generator().manual_seed(0))
        g = torch.Generator().manual_seed(1)
        images = [torch.randint(256, (3, *size), generator=g, dtype=torch.uint8) for size in SIZES]
        encoded = found.family.encode(found.mllm, found.processor, found.tokenizer, images)
        return Scene(found, network, images, stack(encoded))

    return get


def given(made: Scene, row: int) -> dict[str, Any]:
    """What the model's own processor hands to the model of one picture."""
    image = made.images[row]
    nested = [[image]] if made.found.family.nested else [image]
    return dict(made.found.processor(images=nested, return_tensors="pt"))


def placeholders(made: Scene, row: int, ids: list[int]) -> torch.Tensor:
    """A sequence as the model's own forward reads it, with placeholders in the picture's block."""
    token = made.found.tokenizer.picture
    layout = made.pictures.layout
    block = torch.full(made.pictures.features.shape[:2], FEATURE) if layout is None else layout
    seen = block[row][block[row] != PADDING]
    seen = torch.where(seen < 0, token, seen).tolist()
    return torch.tensor([[*made.network.before.tolist(), *seen, *ids]])


def extras(made: Scene, ids: torch.Tensor, answer: int = 0) -> dict[str, torch.Tensor]:
    """What some families' processors say of each token."""
    kind = made.found.mllm.config.model_type
    if kind.startswith("qwen"):
        return {"mm_token_type_ids": (ids == made.found.tokenizer.picture).int()}
    if kind == "paligemma":
        types = torch.zeros_like(ids)
        types[:, ids.shape[1] - answer :] = 1
        return {"token_type_ids": types}
    return {}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_what_the_models_own_vision_path_gives(family, scene):
    made = scene(family)
    for row in range(len(made.images)):
        theirs = made.found.mllm.get_image_features(**given(made, row)).pooler_output
        theirs = torch.cat([part.reshape(-1, part.shape[-1]) for part in theirs])
        batch = made.pictures.take(torch.tensor([row]))
        ours = made.network._picture(batch["features"], batch.get("layout"))[0]
        layout = batch.get("layout", torch.full(ours.shape[:1], FEATURE)[None])[0]
        ours = ours[(layout == FEATURE) | (layout == NEWLINE)]
        torch.testing.assert_close(ours, theirs, **EXACT)
        other = made.found.mllm.get_image_features(**given(made, (row + 1) % 3)).pooler_output
        assert not torch.equal(ours[0], other[0].reshape(-1, ours.shape[1])[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_models_own_forward(family, scene):
    """Rows of different widths together, against each alone in transformers' forward."""
    made = scene(family)
    turns = [[("Is there a dog?", "Yes")], [("What do you see?", "Two cats .")], [("Why?", "No")]]
    rows = conversations(turns, made.found.tokenizer, made.found.template)
    batch = rows.take(torch.arange(3))
    inputs = {name: batch[name] for name in ("ids", "mask", "prefix")}
    inputs |= made.pictures.take(slice(0, 3))
    ours = made.network.logits(**inputs)
    for row in range(3):
        count = int(batch["mask"][row].sum())
        ids = placeholders(made, row, batch["ids"][row, :count].tolist())
        answer = count - int(batch["prefix"][row])
        theirs = made.found.mllm(
            input_ids=ids, use_cache=False, **given(made, row), **extras(made, ids, answer)
        ).logits[0, -count - 1 : -1]
        torch.testing.assert_close(ours[row, :count], theirs, **EXACT)
        assert not torch.allclose(ours[row, :count], theirs.roll(1, 0), rtol=1e-2)
    # At the answers alone the output layer says the same, soft-capping included.
    places, rows = batch["places"], torch.arange(3)[:, None]
    at = made.network.logits(**inputs, places=places)
    assert places.shape[1] < batch["ids"].shape[1]
    torch.testing.assert_close(at, ours[rows, places], **EXACT)
    assert not torch.allclose(at, ours[rows, places - 1], rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captions_are_those_of_generate(family, scene):
    made = scene(family)
    asked = prompt_ids("What do you see?", made.found.tokenizer, made.found.template)
    ours = made.network.captions(
        ids=torch.tensor(asked), length=7, **made.pictures.take(slice(0, 3))
    )
    said = set()
    for row in range(3):
        ids = placeholders(made, row, asked)
        theirs = made.found.mllm.generate(
            input_ids=ids, max_new_tokens=7, do_sample=False, attention_mask=torch.ones_like(ids),
            pad_token_id=made.found.tokenizer.end, **given(made, row), **extras(made, ids),
        )[0, ids.shape[1] :]  # fmt: skip
        assert ours[row, : len(theirs)].tolist() == theirs.tolist()
        said.add(tuple(theirs.tolist()))
    assert len(said) > 1  # a model that says the same of every picture would pass with any features


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_exist_in_lora_and_projector(family, scene):
    made = scene(family)
    add_lora(made.network, 2) if not parameters(made.network, "lora") else None
    lora = start_lora(made.network, torch.Generator().manual_seed(0))
    at = {n: p.clone() + 0.01 for n, p in (parameters(made.network, "projector") | lora).items()}
    for value in at.values():
        value.requires_grad_()
    loss = call(made.network, at, "image", **made.pictures.take(slice(0, 2))).square().sum()
    gradient = torch.autograd.grad(loss, list(at.values()), create_graph=True, allow_unused=True)
    norm = sum((g.square().sum() for g in gradient if g is not None), torch.zeros(()))
    second = torch.autograd.grad(norm, list(at.values()), allow_unused=True)
    used = [n for n, g in zip(at, second, strict=True) if g is not None and g.abs().sum() > 0]
    assert any(".lora_" in n for n in used)
    assert any(made.found.family.projector in n for n in used)


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "paligemma"])
def test_sequences_are_those_of_the_familys_processor(family, scene):
    """Where transformers' processor works without torchvision: its ids of a rendered conversation."""
    import transformers

    made = scene(family)
    raw, images = made.found.tokenizer.tokenizer, made.found.processor
    config = made.found.mllm.config
    side = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    processor: Any = {
        "llava": lambda: transformers.LlavaProcessor(images, raw, **side),
        "llava_next": lambda: transformers.LlavaNextProcessor(images, raw, **side),
        "idefics3": lambda: transformers.Idefics3Processor(
            images, raw, image_seq_len=made.found.mllm.model.image_seq_len
        ),
        "paligemma": lambda: transformers.PaliGemmaProcessor(images, raw),
    }[family]()
    question = "Is there a dog?"
    if family == "paligemma":
        text = f"<image>{question}"
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = raw.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    special = {"add_special_tokens": False} if text.startswith("<s>") else {}
    ours = placeholders(made, 1, prompt_ids(question, made.found.tokenizer, made.found.template))
    theirs = processor(text=[text], images=[made.images[1]], return_tensors="pt", **special)
    assert theirs["input_ids"].tolist() == ours.tolist()
    assert config.image_token_id in ours


def test_another_family_is_refused_by_name():
    with pytest.raises(ProblemError, match=r"'vipllava' is not known.*llava, llava_next, qwen2_vl"):
        family_of("vipllava")
