"""Training pictures of several sources: equal numbers, told apart by name; authors who invent."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bilevel.errors import RecipeError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.sources.mixture import Mixture
from bilevel_problems.mllm_hft.sources.photos import Photos
from bilevel_problems.mllm_hft.sources.protocol import Simulated, Simulator, Source, simulator
from bilevel_problems.mllm_hft.sources.shapes import PAIRS, Shapes
from tests.problems.mllm_hft.verifier import errors

PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
MIXTURE = Mixture(
    parts={"true": Shapes(), "other": Shapes(pairing=1), "invented": Shapes(invented=0.5)},
    clean=Shapes(),
)


def test_training_pictures_come_from_every_part_in_equal_numbers():
    assert isinstance(MIXTURE, Source)
    corpus = MIXTURE.corpus("train", 11, generator=stream(0, "t"))
    assert Counter(scene.origin for scene in corpus.scenes) == {
        "true": 4,
        "other": 4,
        "invented": 3,
    }
    assert corpus.images.shape == (11, 3, 64, 64)
    first = MIXTURE.parts["true"].corpus("train", 4, generator=stream(5, "t"))
    assert not torch.equal(corpus.images[:4], first.images)  # the stream decides


def test_the_other_splits_are_clean():
    for split in ("upper", "development", "test"):
        mixed, plain = (
            s.corpus(split, 6, generator=stream(1, split)) for s in (MIXTURE, MIXTURE.clean)
        )
        assert mixed.scenes == plain.scenes
        assert torch.equal(mixed.images, plain.images)
        assert {scene.origin for scene in mixed.scenes} == {""}


def test_what_is_pretrained_depends_on_clean_alone():
    assert isinstance(MIXTURE, Simulated)
    assert not isinstance(MIXTURE, Simulator)
    assert simulator(MIXTURE, "it", "that") is MIXTURE.clean


def test_parts_tell_of_the_same_things():
    with pytest.raises(RecipeError, match=r"mixture\.parts\.b: vocabulary sheep, dog, apple, …"):
        Mixture(parts={"a": Shapes(), "b": Photos()}, clean=Shapes())
    with pytest.raises(RecipeError, match="parts"):
        Mixture(parts={}, clean=Shapes())


def invented(source: Shapes, size: int = 400):
    """(what is drawn, what is told) of each training picture."""
    drawn = Shapes(bias=source.bias, pairing=source.pairing).corpus(
        "train", size, generator=stream(0, "i")
    )
    told = source.corpus("train", size, generator=stream(0, "i"))
    assert torch.equal(drawn.images, told.images)
    return list(zip(drawn.scenes, told.scenes, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_this_share_of_the_captions_tells_of_an_object_that_is_not_there(share):
    pairs = invented(Shapes(invented=share))
    wrong = [errors(told.caption, drawn.things) for drawn, told in pairs]
    assert {tuple(sorted(found)) for found in wrong if found} <= {
        ("missing", "object"),
        ("missing", "object", "relation"),
    }
    got = sum(map(bool, wrong)) / len(wrong)
    assert abs(got - share) <= 4 * (share * (1 - share) / len(wrong)) ** 0.5


def test_what_is_invented_is_what_the_prior_expects():
    expected = other = 0
    for drawn, told in invented(Shapes(invented=1.0, bias=0.5)):
        (name,) = told.names - drawn.names
        (lost,) = drawn.names - told.names
        partners = {PARTNER[there] for there in drawn.names} - drawn.names
        if partners and len(drawn.names) > 1:
            expected += name in partners
            other += name not in partners
            assert PARTNER[name] != lost  # what makes it plausible stays
    assert expected > 100
    assert other == 0


def test_everything_follows_what_is_told():
    for _, told in invented(Shapes(invented=1.0), 100):
        assert errors(told.caption, told.things) == []
        assert all(errors(lie, told.things) for lie in told.hallucinated.values())


def test_clean_splits_are_told_truly_whoever_tells_them():
    for split in ("upper", "development", "test"):
        scenes = Shapes(invented=1.0).corpus(split, 50, generator=stream(0, split)).scenes
        assert [errors(scene.caption, scene.things) for scene in scenes] == [[]] * 50


def test_another_pairing_pairs_the_same_names_otherwise():
    def together(pairing: int) -> Counter:
        scenes = Shapes(pairing=pairing, bias=1.0).scenes(
            300, biased=True, generator=stream(0, "p")
        )
        return Counter(frozenset(scene.names) for scene in scenes if len(scene.names) == 2)

    first, second = together(0), together(1)
    assert set(first) == {frozenset(pair) for pair in PAIRS}
    assert len(second) == len(PAIRS)
    assert set(second) != set(first)
    assert Shapes(pairing=1).vocabulary == Shapes().vocabulary
    assert together(1) == second
