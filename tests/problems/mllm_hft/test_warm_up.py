"""The projector alone is trained, on the whole batch whatever the micro-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bilevel.rng import stream
from bilevel_problems.mllm_hft import memory
from bilevel_problems.mllm_hft.models.instructions import before, conversations
from bilevel_problems.mllm_hft.models.network import Network
from bilevel_problems.mllm_hft.models.pictures import Pictures
from bilevel_problems.mllm_hft.models.template import Template
from bilevel_problems.mllm_hft.models.tiny import tiny_llava
from bilevel_problems.mllm_hft.models.tokenizer import WordTokenizer
from bilevel_problems.mllm_hft.sources.language import NO, YES, words
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from bilevel_problems.mllm_hft.warm_up import WarmUp, warm_up

pytest.importorskip("transformers", reason="the model is transformers' own")

WORDS = WordTokenizer(words(Shapes()))
HOW = WarmUp(steps=4, batch=5, rate=1e-2, seed=0)


def warmed(folder: str, monkeypatch, how: WarmUp, most: list[int] | None = None) -> Network:
    """A network whose projector is trained, in a cache of its own."""
    monkeypatch.setenv("BILEVEL_CACHE", folder)
    llava = tiny_llava(
        words=WORDS.size, end=WORDS.end, feature=6, hidden=16, layers=1, heads=2, seed=0
    )
    made = Network(llava, before=before(WORDS, Template()), end=WORDS.end, embedding=16)
    made.place(torch.device("cpu"), torch.float64)
    if most is not None:
        made.language.register_forward_pre_hook(
            lambda _, args, given: most.append(len(given["inputs_embeds"])), with_kwargs=True
        )
    asked = [("is there a star ?", YES), ("is there a moon ?", NO), ("is there a ring ?", NO)]
    rows = conversations([asked[:2], asked[2:], asked[1:]], WORDS, Template())
    pictures = Pictures(torch.randn(3, 4, 6, generator=stream(0, "features")))
    list(warm_up(made, pictures, rows, how))
    return made


def weights(network: Network) -> dict[str, Tensor]:
    """But for the heads, which are drawn when a network is made."""
    named = network.mllm.named_parameters()
    return {name: value.detach().clone() for name, value in named}


def test_the_projector_alone_is_trained(tmp_path, monkeypatch):
    untrained = weights(warmed(str(tmp_path), monkeypatch, replace(HOW, steps=0)))
    for name, value in weights(warmed(str(tmp_path), monkeypatch, HOW)).items():
        assert torch.equal(value, untrained[name]) != ("multi_modal_projector" in name), name


@pytest.mark.parametrize("asked", [2, "auto"])
def test_micro_batches_train_the_same_projector(asked, tmp_path, monkeypatch):
    """auto: of a device that has no room for two rows, one at a time."""
    passed: list[int] = []
    whole = weights(warmed(str(tmp_path / "whole"), monkeypatch, HOW, passed))
    assert set(passed) == {5}
    if asked == "auto":
        monkeypatch.setattr(memory, "capacity", lambda device: 1)
    passed.clear()
    how = replace(HOW, micro_batch=asked)
    parts = weights(warmed(str(tmp_path / "parts"), monkeypatch, how, passed))
    assert set(passed[-6:]) == ({1, 2} if asked == 2 else {1})
    for name, value in parts.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-8)
    assert not torch.equal(
        weights(warmed(str(tmp_path), monkeypatch, replace(HOW, seed=1)))[
            "model.multi_modal_projector.linear_1.weight"
        ],
        whole["model.multi_modal_projector.linear_1.weight"],
    )
