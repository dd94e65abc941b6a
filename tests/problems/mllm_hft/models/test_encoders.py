"""Encoders see what is there, say how far they are, and work once for the same pictures."""

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score

from bilevel.errors import ProblemError
from bilevel.events import Progress
from bilevel.rng import stream
from bilevel_problems.mllm_hft.models import cache
from bilevel_problems.mllm_hft.models.encoders import EfficientNet, ViT, imagenet, scaled
from bilevel_problems.mllm_hft.sources.photos import FOLDER, PACKAGE, Photos
from bilevel_problems.mllm_hft.sources.protocol import Corpus, Encoder, Scene, Thing
from bilevel_problems.mllm_hft.sources.shapes import Shapes

needs_stamps = pytest.mark.skipif(
    not Path(FOLDER).is_dir(), reason=f"needs the Debian package {PACKAGE}"
)
SHAPES = Shapes()
SMALL = ViT(width=16, layers=1, heads=2, scenes=64, steps=40, batch=8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    return tmp_path


def drain(generator):
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


def corpus(size, source=SHAPES, seed=0):
    random = stream(seed, "pictures")
    return source.render(source.scenes(size, biased=False, generator=random), random)


def presence_auc(encoder, source, size):
    """Mean over objects: how well a linear probe ranks pictures by whether the object is there."""
    train, test = corpus(size, source), corpus(size // 2, source, seed=1)
    (_, a), (_, b) = (drain(encoder.encode(part, source)) for part in (train, test))
    a, b = (torch.cat([f.mean(1), f.amax(1)], 1).numpy() for f in (a, b))
    found = []
    for name in source.vocabulary:
        here, there = ([name in s.names for s in part.scenes] for part in (train, test))
        probe = RidgeClassifier(alpha=100.0).fit(a, here)
        found.append(roc_auc_score(there, probe.decision_function(b)))
    return sum(found) / len(found)


@pytest.mark.parametrize("encoder", [SMALL, EfficientNet()], ids=["vit", "efficientnet"])
def test_features_come_with_progress_and_the_second_time_from_the_cache(encoder):
    assert isinstance(encoder, Encoder)
    pictures = Corpus(
        corpus(70).scenes, corpus(70).images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    if isinstance(encoder, ViT):
        pictures = corpus(70)
    events, first = drain(encoder.encode(pictures, SHAPES))
    again, second = drain(encoder.encode(pictures, SHAPES))
    assert all(isinstance(event, Progress) for event in events)
    assert (events[-1].done, events[-1].total) == (70, 70)
    assert again == []
    assert first.dtype == torch.float32
    assert first.shape == (70, 16, 16 if isinstance(encoder, ViT) else 320)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert (first.square().mean() - 1).abs() < 0.5


def test_other_pictures_need_new_features_but_no_new_weights():
    drain(SMALL.encode(corpus(10), SHAPES))
    events, _ = drain(SMALL.encode(corpus(10, seed=1), SHAPES))
    assert {event.stage for event in events} == {"picture features"}


@pytest.mark.parametrize(
    ("encoder", "source"),
    [
        (ViT(width=16, layers=1, heads=2, scenes=64, steps=40, batch=8, seed=1), SHAPES),
        (ViT(width=16, layers=1, heads=2, scenes=64, steps=41, batch=8), SHAPES),
        (ViT(width=16, layers=1, heads=2, scenes=64, steps=40, batch=8, lr=1e-3), SHAPES),
        (SMALL, Shapes(noise=1.0)),
    ],
)
def test_other_options_or_another_source_need_new_weights(encoder, source):
    pictures = corpus(10)
    _, first = drain(SMALL.encode(pictures, SHAPES))
    events, second = drain(encoder.encode(pictures, source))
    assert {event.stage for event in events} == {"vision encoder", "picture features"}
    assert not torch.allclose(first, second)


def test_training_is_repeatable_and_leaves_the_global_generator_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, first = drain(SMALL.encode(corpus(10), SHAPES))
    assert torch.equal(torch.get_rng_state(), before)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    torch.manual_seed(6)
    _, second = drain(SMALL.encode(corpus(10), SHAPES))
    assert torch.equal(first, second)


def test_a_picture_is_encoded_alike_alone_and_among_others():
    pictures = corpus(70)
    _, together = drain(SMALL.encode(pictures, SHAPES))
    one = Corpus(pictures.scenes[66:67], pictures.images[66:67])
    _, alone = drain(SMALL.encode(one, SHAPES))
    torch.testing.assert_close(alone[0], together[66], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_trained_vit_sees_objects_and_an_untrained_one_does_not():
    assert presence_auc(ViT(), SHAPES, 600) > 0.95
    assert presence_auc(ViT(steps=0, scenes=96), SHAPES, 600) < 0.75  # negative control


@pytest.mark.slow
@needs_stamps
def test_efficientnet_sees_photographed_objects():
    assert presence_auc(EfficientNet(), Photos(), 300) > 0.9


IMAGENET = {"zebra": 340, "trumpet": 513, "penguin": 145, "duck": 97, "guitar": 402, "bus": 654}
"""Classes zebra, cornet, king penguin, drake, acoustic guitar, minibus."""


@needs_stamps
def test_the_weights_are_those_of_imagenet():
    """Large photographs on a plain ground are classified right, and not so with pixels unscaled."""
    network = imagenet()
    source = Photos(pixels=512)
    scenes = tuple(Scene((Thing(name, None, 0.5, 0.5),), "", {}) for name in IMAGENET)
    images = source.render(scenes, stream(0, "r")).images[:, :, 144:368, 144:368]
    with torch.inference_mode():
        top = network(scaled(images)).topk(5).indices
        raw = network(images.float()).topk(5).indices
    classes = torch.tensor(list(IMAGENET.values()))[:, None]
    assert (top == classes).any(1).sum() >= 5
    assert (raw == classes).any(1).sum() <= 1  # negative control


def test_a_patch_that_does_not_divide_the_picture_is_refused():
    with pytest.raises(ProblemError, match=r"encoder\.patch = 24"):
        drain(ViT(patch=24, scenes=4).encode(corpus(2), SHAPES))


def test_more_cells_than_the_network_has_are_refused():
    with pytest.raises(ProblemError, match=r"encoder\.grid = 4; must be at most 2"):
        drain(EfficientNet().encode(corpus(2), SHAPES))
    _, features = drain(EfficientNet(grid=2).encode(corpus(2), SHAPES))
    assert features.shape == (2, 4, 320)


def test_the_cache_holds_weights_and_features(folder):
    drain(SMALL.encode(corpus(10), SHAPES))
    kept = sorted(path.parent.name for path in cache.folder().rglob("*.safetensors"))
    assert kept == ["features", "vit"]
