"""Runs that follow each other in a process on the same pictures share them, and nothing else."""

from dataclasses import replace

import pytest
import torch

from bilevel.errors import ProblemError
from bilevel.rng import Streams, stream
from bilevel_problems.mllm_hft import preparation
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.encoders import EfficientNet, ViT
from bilevel_problems.mllm_hft.models.tiny import Tiny
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.protocol import Scene
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.miniature import miniature, prepared

pytest.importorskip("transformers", reason="the model is transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")

pytestmark = pytest.mark.usefixtures("cache")

EYES = {"width": 16, "layers": 1, "heads": 2, "scenes": 16, "steps": 2, "batch": 8}
WORDS = {"hidden": 16, "layers": 1, "heads": 2, "rank": 2, "steps": 3, "batch": 4, "scenes": 16}


@pytest.fixture
def told(monkeypatch):
    """The splits whose pictures were drawn, from no memory of earlier tests."""
    monkeypatch.setattr(preparation, "_LAST", {})
    splits, draw = [], preparation._corpus
    monkeypatch.setattr(
        preparation, "_corpus", lambda problem, split, size: splits.append(split) or draw(problem, split, size)
    )  # fmt: skip
    return splits


def test_the_same_pictures_are_drawn_once(told):
    first = prepared()
    assert told == ["train", "upper", "test"]
    again = prepared(formulation="joint", contrast=0.3, lower_batch=2)
    assert told == ["train", "upper", "test", "test"]
    assert again._prepared.train is first._prepared.train
    assert again._prepared.loaded.network is not first._prepared.loaded.network


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"train": 13},
        {"source": Shapes(bias=0.3)},
        {"encoder": ViT(**{**EYES, "width": 8})},
        {"model": Tiny(**{**WORDS, "hidden": 8})},
    ],
    ids=lambda options: next(iter(options)),
)
def test_others_are_drawn_anew_and_are_what_they_are_without_a_run_before(told, options):
    prepared()
    del told[:]
    after = prepared(**options)
    assert "train" in told
    preparation._LAST.clear()
    alone = prepared(**options)
    ours, theirs = after._prepared.train, alone._prepared.train
    assert torch.equal(ours.pictures.features, theirs.pictures.features)
    assert torch.equal(ours.dialogues.ids, theirs.dialogues.ids)


def said(problem, data):
    """The words that the task loss counts, by conversation."""
    tokenizer = problem._prepared.loaded.tokenizer
    return [
        tokenizer.decode(ids[counted].tolist()).split()
        for ids, counted in zip(data.dialogues.ids, data.dialogues.counted, strict=True)
    ]


def test_the_upper_loss_may_be_of_answers_alone(told):
    whole, asked = prepared(), prepared(upper_turns="questions")
    described, answers = (said(p, p._prepared.upper) for p in (whole, asked))
    for some, all_of_them in zip(answers, described, strict=True):
        assert some
        assert set(some) <= {"yes", "no"}
        is_alone = not {"yes", "no"} & set(all_of_them)  # described without a question
        assert is_alone or all_of_them[: len(some)] == some
        assert set(all_of_them) > set(some) or is_alone
    # nothing else is other than it was
    assert said(asked, asked._prepared.train) == said(whole, whole._prepared.train)
    ours, theirs = (p._prepared.upper.pictures.features for p in (whole, asked))
    assert torch.equal(ours, theirs)


def test_conversations_of_the_pictures_own_cannot_be_told_apart(told):
    scene = Scene((), "a caption", {}, turns=(("What is this?", "A cat."),))
    assert preparation._undescribed((replace(scene, turns=()),))[0].caption == ""
    with pytest.raises(ProblemError, match="upper_turns=questions"):
        preparation._undescribed((replace(scene, turns=()), scene))


def test_another_cache_is_filled(told, tmp_path, monkeypatch):
    prepared()
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    prepared()
    assert told.count("train") == 2


def test_a_run_on_shared_pictures_is_that_of_a_process_of_its_own(told):
    def losses():
        problem = prepared()
        x, y = problem.init(Streams(0))
        batches = problem.lower_batches(stream(0, "l"))
        return [float(problem.lower_loss(x, y, next(batches))) for _ in range(3)]

    first, again = losses(), losses()
    assert told.count("train") == 1
    assert first == again


@pytest.mark.parametrize(
    "options",
    [
        {"source": Photos()},
        {"source": Mixture(parts={"a": Photos(), "b": Photos()}, clean=Photos())},
        {"encoder": EfficientNet()},
    ],
    ids=["photos", "a part of a mixture", "encoder"],
)
def test_what_reads_files_is_not_shared(options):
    assert not preparation._is_drawn(miniature(**options))
    assert preparation._is_drawn(miniature())
    parts = {"a": Shapes(), "b": Shapes(invented=1.0)}
    assert preparation._is_drawn(miniature(source=Mixture(parts=parts, clean=Shapes())))


def test_what_is_read_from_a_folder_is_read_every_time(told, checkpoint):
    template = "USER: <image>\n{prompt} ASSISTANT:"
    model = Checkpoint(path=checkpoint, template=template, rank=2, embedding=8)
    problem = miniature(model=model, encoder=None)
    for _ in range(2):
        list(problem.prepare())
    assert told.count("train") == 2
    assert not preparation._LAST
