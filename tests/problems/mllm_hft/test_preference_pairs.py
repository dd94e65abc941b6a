"""Pairs of captions: rows, batches, and what a model says of them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.models.instructions import conversations
from bilevel_problems.mllm_hft.models.network import Network, parameters
from bilevel_problems.mllm_hft.models.pictures import FEATURE, PADDING, Pictures
from bilevel_problems.mllm_hft.models.template import Template
from bilevel_problems.mllm_hft.models.tokenizer import WordTokenizer
from bilevel_problems.mllm_hft.preference_pairs import (
    CaptionPairs,
    caption_pairs,
    preference,
    preference_batch,
    spread,
    with_reference,
)
from bilevel_problems.mllm_hft.preferences import chip, chip_released
from bilevel_problems.mllm_hft.sources.protocol import Scene

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

WORDS = WordTokenizer(
    ["describe", "the", "picture", ":", "one", "two", "red", "blue", "circle", "square", "and"]
)
KINDS = ("object", "count")
SCENES = (
    Scene((), "one red circle", {"object": "one red square", "count": "two red circle"}),
    Scene((), "two blue square and one circle", {"count": "two blue square and two circle"}),
    Scene((), "one circle", {}),
    Scene((), "", {"object": "one square"}),
)


def pairs(scenes: tuple[Scene, ...] = SCENES) -> CaptionPairs:
    return caption_pairs(scenes, KINDS, WORDS, Template())


def network() -> Network:
    from bilevel_problems.mllm_hft.models.adapters import add_lora
    from bilevel_problems.mllm_hft.models.instructions import before
    from bilevel_problems.mllm_hft.models.tiny import tiny_llava

    mllm = tiny_llava(
        words=WORDS.size, end=WORDS.end, feature=6, hidden=16, layers=2, heads=2, seed=0
    )
    made = Network(mllm, before=before(WORDS, Template()), end=WORDS.end, embedding=16)
    add_lora(made, 2)
    return made.to(torch.float64)


def batch(size: int = 6, seed: int = 0) -> dict[str, Any]:
    features = torch.randn(4, 3, 6, generator=stream(9, "features"), dtype=torch.float64)
    pictures = Pictures(features)
    found = preference_batch(pairs(), pictures, spread(pictures), size, stream(seed, "b"))
    return with_reference(at_start(), found, torch.device("cpu"), torch.float64)


@cache
def at_start() -> Network:
    return network()


def test_answers_are_counted_and_what_differs_is_marked():
    found = pairs()
    sides = found.take(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))

    def words(side: str, row: int, mark: str) -> str:
        return WORDS.decode(sides[side]["ids"][row][sides[side][mark][row]].tolist())

    assert [words("chosen", i, "counted") for i in range(3)] == [
        "one red circle",
        "one red circle",
        "two blue square and one circle",
    ]
    assert [words("chosen", i, "changed") for i in range(3)] == ["circle", "one", "one"]
    assert [words("rejected", i, "changed") for i in range(3)] == ["square", "two", "two"]
    for side in ("chosen", "rejected"):
        assert not (sides[side]["changed"] & ~sides[side]["counted"]).any()


def test_a_pair_needs_a_caption_and_one_that_is_wrong():
    found, source = pairs(), stream(0, "draw")
    seen = set()
    for _ in range(40):
        scene, kind = found.draw(2, source)
        assert len(set(scene.tolist())) == 2
        seen |= set(zip(scene.tolist(), kind.tolist(), strict=True))
    assert seen == {(0, 0), (0, 1), (1, 1)}
    assert len(found.draw(5, source)[0]) == 5
    with pytest.raises(ProblemError, match="both a caption and a hallucinated one"):
        pairs(SCENES[2:]).draw(1, source)


def test_the_spread_is_that_of_features_and_not_of_padding():
    features = torch.tensor([[[1.0, 10.0], [3.0, 10.0]], [[5.0, 16.0], [0.0, 0.0]]])
    layout = torch.tensor([[FEATURE, FEATURE], [FEATURE, PADDING]])
    assert spread(Pictures(features, layout)).tolist() == pytest.approx([2.0, 12**0.5])


def test_the_model_as_it_starts_prefers_nothing():
    at = preference(at_start(), {}, batch())
    assert float(chip(at)) == pytest.approx(3 * math.log(2), rel=1e-9)
    assert float(chip_released(at)) == pytest.approx(math.log(2), rel=1e-9)
    assert at.chosen_kl.abs().max() < 1e-9


def test_gains_are_those_of_each_response_alone():
    """Row by row, unpadded, each token looked up in a forward of its own sequence."""
    drawn = batch()
    moved = {n: p + 0.1 for n, p in parameters(at_start(), "projector").items()}
    at = preference(at_start(), moved, drawn)
    other = network()
    other.load_state_dict(moved, strict=False)

    def said(model: Network, caption: str, features: torch.Tensor) -> float:
        rows = conversations([[("describe the picture :", caption)]], WORDS, Template())
        logits = model.logits(rows.ids, rows.mask, features[None])[0].log_softmax(-1)
        return sum(
            float(logits[j, rows.ids[0, j]]) for j in range(rows.ids.shape[1]) if rows.counted[0, j]
        )

    for i in range(len(drawn["kind"])):
        sides = [
            WORDS.decode(drawn[side]["ids"][i][drawn[side]["counted"][i]].tolist())
            for side in ("chosen", "rejected")
        ]
        clean, noisy = drawn["pictures"]["features"][i], drawn["noisy"][i]
        for got, caption, features in (
            (at.chosen, sides[0], clean),
            (at.rejected, sides[1], clean),
            (at.noisy, sides[0], noisy),
        ):
            gain = said(other, caption, features) - said(at_start(), caption, features)
            assert float(got.gain()[i]) == pytest.approx(gain, rel=1e-6, abs=1e-9)
            assert abs(gain) > 1e-6


@pytest.mark.parametrize("loss", [chip, chip_released])
def test_a_step_down_raises_the_preferred_over_the_rejected(loss):
    drawn = batch()
    at = {n: p.clone().requires_grad_() for n, p in parameters(at_start(), "projector").items()}
    before = preference(at_start(), at, drawn)
    slopes = torch.autograd.grad(loss(before), list(at.values()))
    moved = {n: (p - 0.5 * s).detach() for (n, p), s in zip(at.items(), slopes, strict=True)}
    after = preference(at_start(), moved, drawn)
    assert float(loss(after)) < float(loss(before).detach())
    preferred = (after.chosen.gain() - after.rejected.gain()).mean()
    assert float(preferred) > 0


def test_a_weight_of_a_pair_multiplies_its_term():
    at = preference(
        at_start(), {n: p + 0.1 for n, p in parameters(at_start(), "projector").items()}, batch(2)
    )
    for loss in (chip, chip_released):
        one, other = (float(loss(at, weights=torch.eye(2)[i])) for i in range(2))
        assert float(loss(at)) == pytest.approx(one + other, rel=1e-6)
        assert float(loss(at, weights=torch.tensor([3.0, 0.5]))) == pytest.approx(
            3 * one + 0.5 * other, rel=1e-6
        )


@pytest.mark.parametrize("size", [1, 4])
def test_the_reference_is_the_same_in_micro_batches(size):
    """Of 6 pairs, and no more than `size` of them pass the model at a time."""
    whole, passed = batch(), []
    bare = {name: value for name, value in whole.items() if name != "reference"}
    hook = at_start().language.register_forward_pre_hook(
        lambda _, args, given: passed.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    found = with_reference(at_start(), bare, torch.device("cpu"), torch.float64, size)
    hook.remove()
    assert passed == {1: [1] * 18, 4: [4] * 3 + [2] * 3}[size]
    for name, value in whole["reference"].items():
        torch.testing.assert_close(found["reference"][name], value, rtol=1e-10, atol=1e-12)


def test_the_spread_is_read_in_parts(monkeypatch):
    """150 pictures, of which places are padded: the standard deviation of those that are not."""
    features = 3 + torch.randn(150, 4, 5, generator=stream(3, "f"), dtype=torch.float64)
    layout = torch.where(torch.arange(4) < torch.arange(150)[:, None] % 4 + 1, FEATURE, PADDING)
    expected = features[layout == FEATURE].std(0)
    torch.testing.assert_close(spread(Pictures(features, layout)), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(spread(Pictures(features)), expected, rtol=1e-4)
    assert spread(Pictures(features.float())).dtype == torch.float32
