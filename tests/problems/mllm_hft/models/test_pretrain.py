"""Pretraining on text, and what is read off it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bilevel import rng
from bilevel_problems.mllm_hft.models.instructions import before, conversations, places
from bilevel_problems.mllm_hft.models.network import Network
from bilevel_problems.mllm_hft.models.pretrain import (
    ALONE,
    QUESTIONS,
    TextTraining,
    _weights,
    answer_scores,
    answer_words,
    dialogues,
    last_place,
    learn_language,
    pretrain,
    question_accuracy,
    train,
)
from bilevel_problems.mllm_hft.models.template import Template
from bilevel_problems.mllm_hft.models.tiny import tiny_llava
from bilevel_problems.mllm_hft.models.tokenizer import WordTokenizer
from bilevel_problems.mllm_hft.sources.language import NO, YES, words
from bilevel_problems.mllm_hft.sources.protocol import OwnQuestion
from bilevel_problems.mllm_hft.sources.shapes import Shapes

pytest.importorskip("transformers", reason="the model is transformers' own")

SOURCE = Shapes()
TOKENIZER = WordTokenizer(words(SOURCE))


def network(hidden: int = 16) -> Network:
    llava = tiny_llava(
        words=TOKENIZER.size, end=TOKENIZER.end, feature=6, hidden=hidden, layers=2, heads=4, seed=0
    )
    start = before(TOKENIZER, Template())
    return Network(llava, before=start, end=TOKENIZER.end, embedding=hidden)


def training(**options) -> TextTraining:
    chosen = {"seed": 0, "scenes": 200, "steps": 20, "batch": 16, "rate": 4e-3, **options}
    return TextTraining(SOURCE, TOKENIZER, Template(), **chosen)


def language(made: Network) -> torch.nn.Module:
    return torch.nn.ModuleList([made.mllm.model.language_model, made.mllm.lm_head])


def test_dialogues_are_true_of_their_scenes():
    g = rng.stream(0, "test")
    scenes = SOURCE.scenes(50, biased=True, generator=g)
    yes = no = 0
    for scene, turns in zip(scenes, dialogues(scenes, SOURCE, g, alone=0.0), strict=True):
        assert turns[-1][1] == scene.caption
        assert 1 < len(turns) <= 1 + QUESTIONS
        for prompt, answer in turns[:-1]:
            there = prompt.split()[-2] in scene.names
            assert answer == (YES if there else NO)
            yes, no = yes + there, no + (not there)
    assert yes == no > 50


def test_dialogues_about_files_ask_as_pope_does_and_answer_so():
    scenes = SOURCE.scenes(50, biased=True, generator=rng.stream(0, "test"))
    own = (OwnQuestion("Is it red?", True, "own"),)
    scenes = tuple(replace(scene, ask="{question} Yes or no?") for scene in scenes)
    scenes = (*scenes, replace(scenes[0], questions=own))
    said = dialogues(scenes, SOURCE, rng.stream(0, "asked"), alone=0.0)
    asked = [turn for turns in said for turn in turns[:-1]]
    assert {answer for _, answer in asked} == {"Yes", "No"}
    assert said[-1][0] == ("Is it red?", "Yes")
    made = [prompt for turns in said[:-1] for prompt, _ in turns[:-1]]
    assert all(re.fullmatch(r"Is there an? \w+ in the image\? Yes or no\?", p) for p in made)


def test_a_share_of_pictures_is_described_and_asked_nothing():
    scenes = SOURCE.scenes(400, biased=True, generator=rng.stream(0, "test"))
    said = dialogues(scenes, SOURCE, rng.stream(0, "asked"))
    assert max(len(turns) for turns in said) == 1 + QUESTIONS
    assert all(
        turns[-1] == (s.instruction, s.caption) for turns, s in zip(said, scenes, strict=True)
    )
    share = sum(len(turns) == 1 for turns in said) / len(said)
    assert abs(share - ALONE) < 4 * (ALONE * (1 - ALONE) / len(said)) ** 0.5


def test_a_picture_without_a_caption_keeps_its_questions():
    scenes = SOURCE.scenes(40, biased=True, generator=rng.stream(0, "test"))
    mute = tuple(replace(scene, caption="") for scene in scenes)
    for turns in dialogues(mute, SOURCE, rng.stream(0, "asked"), alone=1.0):
        assert turns
        assert {answer for _, answer in turns} <= {YES, NO}


def test_answers_weigh_most_and_padding_nothing():
    turns = [
        [("is there a star ?", "no"), ("is there an arrow ?", "yes")],
        [("is there a star ?", "yes")],
    ]
    rows = conversations(turns, TOKENIZER, Template(), contexts=["one red star .", "one moon ."])
    weights = _weights(rows, answer_words(TOKENIZER, Template()))
    said = torch.isin(rows.ids, torch.tensor([TOKENIZER.encode(w)[0] for w in (YES, NO)]))
    assert (weights[said] == 5).all()
    assert int(said.sum()) == 3
    assert (weights[~rows.mask] == 0).all()
    assert (weights[rows.mask & ~rows.counted] == 0.2).all()
    bare = _weights(rows, answer_words(TOKENIZER, Template()), read=0.0)
    assert torch.equal(bare, weights * rows.counted)


@pytest.mark.parametrize("read", [0.2, 0.0])
def test_what_weighs_nothing_does_not_reach_the_output_layer(read, monkeypatch, tmp_path):
    """And a model that was trained with another weight is not taken out of the cache."""
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    made, text, seen = network(), training(steps=2), list[torch.Size]()
    list(learn_language(made, language(made), text, "language", {}))
    made.mllm.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    text = replace(text, read=read)
    list(learn_language(made, language(made), text, "language", {}))
    assert len(seen) == (0 if read else 2)
    assert all(8 < shape[1] < 45 for shape in seen)  # texts, questions and answers are 70 and more


def test_places_are_those_that_count_and_none_twice():
    """Rows of two, three and no counted tokens: the first are filled up with what does not count."""
    counted = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    found = places(counted)
    assert found.tolist() == [[1, 3, 0], [0, 2, 3], [0, 1, 2]]
    assert counted.gather(1, found).sum(1).tolist() == counted.sum(1).tolist()
    assert places(counted[2:]).shape == (1, 0)
    assert places(counted[:0]).shape == (0, 0)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 15])
def test_any_number_of_steps_can_be_taken(steps):
    at = torch.nn.Parameter(torch.ones(()))
    (event,) = train([at], at.square, "here", steps, 0.01)
    assert (event.done, event.total) == (steps, steps)
    assert 0 < float(at) < 1


def test_answer_scores_read_the_last_place():
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 3], logits[0, 2, 3], logits[1, 2, 4] = 2.0, 9.0, 1.5
    place = last_place(torch.tensor([[True, True, False], [True, True, True]]))
    read = logits.gather(1, place[..., None].expand(-1, -1, 5))
    assert answer_scores(read, ((3,), (4,))).tolist() == [2.0, -1.5]


def test_pretraining_lowers_the_loss_and_leaves_the_projector_alone():
    made = network()
    projector = {n: p.clone() for n, p in made.mllm.model.multi_modal_projector.named_parameters()}
    events = list(pretrain(made, language(made), training(steps=100)))
    losses = [float(event.note.split()[-1]) for event in events]
    assert losses[-1] < losses[0] - 0.1
    for name, value in made.mllm.model.multi_modal_projector.named_parameters():
        assert torch.equal(value, projector[name])
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_pretraining_is_a_function_of_its_seed():
    def weights(seed: int) -> torch.Tensor:
        made = network()
        list(pretrain(made, language(made), training(steps=3, seed=seed)))
        return made.mllm.lm_head.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_untrained_model_answers_at_chance():
    accuracy = question_accuracy(network(), training())
    assert 0.4 < accuracy < 0.6


@pytest.mark.slow
def test_a_trained_model_answers_held_out_questions():
    """300 steps answer most questions; 20 of them (the control) do not."""
    made = network(96)
    text = training(scenes=6000, steps=300, batch=32)
    list(pretrain(made, language(made), text))
    assert question_accuracy(made, text) > 0.75
    early = network(96)
    list(pretrain(early, language(early), training(scenes=6000, steps=20, batch=32)))
    assert question_accuracy(early, text) < 0.65
