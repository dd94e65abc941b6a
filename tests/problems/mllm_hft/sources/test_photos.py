"""Scenes of photographs: true captions without colours, and pictures that show them."""

from pathlib import Path

import pytest
import torch

from bilevel.errors import RequirementError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.sources.photos import FOLDER, PACKAGE, PAIRS, PHOTOS, Photos
from bilevel_problems.mllm_hft.sources.protocol import Scene, Source, Thing
from tests.problems.mllm_hft.verifier import errors

needs_stamps = pytest.mark.skipif(
    not Path(FOLDER).is_dir(), reason=f"needs the Debian package {PACKAGE}"
)
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
BIASED, UNBIASED = (
    Photos().scenes(1500, biased=biased, generator=stream(0, "test")) for biased in (True, False)
)


def alone(name, x=0.5, y=0.5):
    return Scene((Thing(name, None, x, y),), f"one {name} .", {})


def test_is_a_source_of_every_name_with_a_photograph():
    assert isinstance(Photos(), Source)
    assert set(Photos().vocabulary) == set(PHOTOS)
    assert len(set(Photos().vocabulary)) == 24


@pytest.mark.parametrize("scenes", [BIASED, UNBIASED], ids=["biased", "unbiased"])
def test_captions_are_true_and_lies_are_false_in_the_way_they_say(scenes):
    for scene in scenes:
        assert errors(scene.caption, scene.things) == []
        assert "object" in scene.hallucinated
        for kind, lie in scene.hallucinated.items():
            assert kind in Photos().kinds
            assert set(errors(lie, scene.things)) - {"missing"} == {kind}, (lie, scene.things)


def test_names_co_occur_under_bias_alone():
    def together(scenes):
        found = [PARTNER[name] in scene.names for scene in scenes for name in scene.names]
        return sum(found) / len(found)

    assert together(BIASED) > 0.92
    assert together(UNBIASED) < 0.15


def test_missing_photographs_are_named_with_the_remedy(tmp_path):
    with pytest.raises(RequirementError, match=f"apt-get install {PACKAGE}") as raised:
        Photos(folder=str(tmp_path)).render((alone("dog"),), stream(0, "r"))
    assert str(tmp_path) in str(raised.value)
    assert "source.folder" in str(raised.value)


@needs_stamps
def test_stamps_are_read_from_the_folder_given(tmp_path):
    for files in PHOTOS.values():
        for file in files:
            target = tmp_path / f"{file}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(FOLDER, f"{file}.png"))
    got, expected = (
        source.render((alone("dog"),), stream(0, "r")).images
        for source in (Photos(folder=str(tmp_path)), Photos())
    )
    assert torch.equal(got, expected)
    (tmp_path / "animals/birds/duck.png").unlink()
    with pytest.raises(RequirementError, match="1 photograph"):
        Photos(folder=str(tmp_path)).render((alone("dog"),), stream(0, "r"))


@needs_stamps
@pytest.mark.parametrize("name", Photos().vocabulary)
def test_the_object_is_where_the_scene_says(name):
    def distance(shown, x, y):
        picture = Photos().render((alone(name, *shown),), stream(0, "r")).images
        ground = Photos().render((Scene((), "", {}),), stream(0, "r")).images
        changed = ((picture.float() - ground.float()).abs().amax(1)[0] > 50).nonzero().float()
        assert len(changed) > 60
        return float((changed.mean(0) / 128 - torch.tensor([y, x])).norm())

    assert distance((0.2, 0.7), 0.2, 0.7) < 0.1
    assert distance((0.8, 0.3), 0.2, 0.7) > 0.4  # negative control


@needs_stamps
def test_rendering_is_pure_in_the_generator_and_every_picture_differs():
    corpus, again = (Photos().render((alone("cow"),) * 6, stream(0, "r")) for _ in range(2))
    assert torch.equal(corpus.images, again.images)
    assert corpus.images.shape == (6, 3, 128, 128)
    assert len({image.numpy().tobytes() for image in corpus.images}) == 6
    small = Photos(pixels=96).render((alone("cow"),), stream(0, "r"))
    assert small.images.shape == (1, 3, 96, 96)
