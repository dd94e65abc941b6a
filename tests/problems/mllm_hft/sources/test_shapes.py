"""Scenes of shapes: captions are true, lies are lies of their kind, bias is where it should be."""

import itertools
import math
from collections import Counter

import pytest
import torch

from bilevel.rng import stream
from bilevel_problems.mllm_hft.sources.outlines import OUTLINES
from bilevel_problems.mllm_hft.sources.protocol import KINDS, Scene, Source, Thing
from bilevel_problems.mllm_hft.sources.shapes import COLOURS, PAIRS, Shapes
from tests.problems.mllm_hft.verifier import errors, singular

SIZE = 3000
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


def draw(source=None, *, biased, size=SIZE, name="test"):
    return (source or Shapes()).scenes(size, biased=biased, generator=stream(0, name))


BIASED, UNBIASED = draw(biased=True), draw(biased=False)


def test_is_a_source():
    assert isinstance(Shapes(), Source)


@pytest.mark.parametrize("scenes", [BIASED, UNBIASED], ids=["biased", "unbiased"])
def test_captions_are_true_and_complete(scenes):
    assert [errors(scene.caption, scene.things) for scene in scenes] == [[]] * len(scenes)


def test_the_verifier_finds_captions_of_other_scenes_false():  # negative control
    wrong = [errors(a.caption, b.things) for a, b in itertools.pairwise(UNBIASED)]
    assert sum(map(bool, wrong)) > 0.99 * len(wrong)


def test_the_verifier_names_each_error():  # negative control
    things = (Thing("star", "red", 0.1, 0.1), Thing("ring", "blue", 0.9, 0.2))
    said = "one red star and one blue ring . the red star is left of the blue ring ."
    assert errors(said, things) == []
    assert errors(said.replace("star", "moon"), things) == ["object", "missing"]
    assert errors(said.replace("red", "green"), things) == ["attribute"]
    assert errors(said.replace("left", "right"), things) == ["relation"]
    assert errors(said.replace("left of", "below"), things) == ["relation"]
    two = "two red stars and one blue ring . the red stars are left of the blue ring ."
    assert errors(two, things) == ["count"]
    assert errors("one red star .", things) == ["missing"]


@pytest.mark.parametrize("scenes", [BIASED, UNBIASED], ids=["biased", "unbiased"])
@pytest.mark.parametrize("kind", KINDS)
def test_hallucinated_captions_are_false_in_the_way_they_say(scenes, kind):
    told = [(scene, scene.hallucinated[kind]) for scene in scenes if kind in scene.hallucinated]
    assert len(told) > 0.8 * len(scenes)
    for scene, lie in told:
        assert lie != scene.caption
        # a swapped object leaves the group with no thing to relate: vacuously true, not counted
        assert set(errors(lie, scene.things)) - {"missing"} == {kind}, (lie, scene.things)


def test_a_lie_has_the_form_of_a_truth():
    """Numbers, lengths and verbs of the lies occur among the truths: form gives nothing away."""

    def form(text):
        return "".join(
            "N" if singular(word) in PARTNER
            else "C" if word in COLOURS
            else word + " "
            for word in text.split()
        )  # fmt: skip

    truths = {form(scene.caption) for scene in draw(biased=False, size=20_000, name="forms")}
    for kind in KINDS:
        lies = [form(s.hallucinated[kind]) for s in UNBIASED if kind in s.hallucinated]
        assert sum(lie in truths for lie in lies) > 0.99 * len(lies)
    assert form("two red stars and two red moons .") not in truths  # negative control


def test_swapped_numbers_are_spread_as_true_ones():
    """Of scenes with one name, which have no relation; others differ in the other names alone."""
    alone = [s for s in draw(biased=False, size=12_000, name="alone") if len(s.names) == 1]
    pairs = [(s.caption.split()[0], s.hallucinated["count"].split()[0]) for s in alone]
    assert all(true != false for true, false in pairs)
    error = math.sqrt(1 / 3 * 2 / 3 / len(pairs))
    for side in zip(*pairs, strict=True):
        shares = [side.count(number) / len(pairs) for number in ("one", "two", "three")]
        assert all(abs(share - 1 / 3) < 4 * error for share in shares)
    one_more = [{"one": "two", "two": "three", "three": "two"}[true] for true, _ in pairs]
    assert one_more.count("two") / len(pairs) > 1 / 3 + 4 * error  # negative control


def names_in(text):
    return [name for word in text.split() if (name := singular(word)) in PARTNER]


def test_lies_list_names_in_the_order_of_truths():
    order = Shapes().vocabulary.index
    for scene in UNBIASED:
        for text in (scene.caption, *scene.hallucinated.values()):
            places = [order(name) for name in names_in(text.split(" .")[0])]
            assert places == sorted(places)


@pytest.mark.parametrize(("word", "opposite"), [("above", "below"), ("left", "right")])
def test_relations_go_both_ways_whatever_the_order_of_names(word, opposite):
    """Or else a swapped relation could be told from the text alone."""
    order = Shapes().vocabulary.index
    forward = []
    for sentence in (scene.caption.split(" . ")[-1] for scene in UNBIASED):
        if word in sentence or opposite in sentence:
            first, second = names_in(sentence)
            forward.append((order(first) < order(second)) == (word in sentence))
    assert len(forward) > SIZE / 3
    assert abs(sum(forward) / len(forward) - 0.5) < 4 * 0.5 / math.sqrt(len(forward))


def together(scenes):
    """How often the partner of a name is there, over all names that are there."""
    there = [PARTNER[name] in scene.names for scene in scenes for name in scene.names]
    return sum(there) / len(there), len(there)


def test_pairs_come_whole_under_bias_alone():
    rate, count = together(BIASED)
    # Of the names in sight, 2 b of 2 b + (1 - b) belong to whole pairs.
    expected = 2 * 0.9 / (2 * 0.9 + 0.1)
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_names_are_independent_without_bias():
    sizes = [len(scene.names) for scene in UNBIASED]
    expected = sum(n * (n - 1) / 11 for n in sizes) / sum(sizes)
    rate, count = together(UNBIASED)
    error = math.sqrt(2 * expected * (1 - expected) / count)  # a pair is counted from both ends
    assert abs(rate - expected) < 4 * error
    assert abs(together(BIASED)[0] - expected) > 40 * error  # negative control


def test_nothing_but_the_names_tells_biased_scenes_from_others():
    for measure in (lambda s: len(s.names), lambda s: len(s.things), lambda s: s.things[0].x):
        a, b = (
            torch.tensor([float(measure(scene)) for scene in scenes])
            for scenes in (BIASED, UNBIASED)
        )
        error = math.sqrt((a.var() + b.var()) / SIZE)
        assert abs(a.mean() - b.mean()) < 4 * error


def test_the_vocabulary_is_ordered_by_frequency_under_bias():
    counts = Counter(name for scene in BIASED for name in scene.names)
    found = [sum(counts[name] for name in pair) for pair in PAIRS]
    assert tuple(name for pair in PAIRS for name in pair) == Shapes().vocabulary
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.5 * found[-1]


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_bias_is_what_it_says(bias):
    rate, count = together(draw(Shapes(bias=bias), biased=True))
    expected = 2 * bias / (2 * bias + 1 - bias)
    assert abs(rate - expected) <= 4 * math.sqrt(expected * (1 - expected) / count)


def plausible(scenes):
    """Of scenes where a partner is absent, how often the swapped object is such a partner."""
    found = []
    for scene in scenes:
        expected = {PARTNER[name] for name in scene.names} - scene.names
        if expected and len(scene.names) > 1:
            lie = set(scene.hallucinated["object"].replace("crosses", "cross").split())
            new = {w.removesuffix("s") if w != "cross" else w for w in lie} & set(PARTNER)
            found.append(bool((new - scene.names) & expected))
    return sum(found) / len(found)


def test_swapped_objects_are_those_that_the_prior_expects():
    assert plausible(UNBIASED) > 0.88
    assert plausible(draw(Shapes(bias=0.0), biased=False)) < 0.4  # negative control


def test_scenes_are_pure_in_the_generator():
    assert draw(biased=True, size=50) == BIASED[:50]
    assert draw(biased=True, size=50, name="other") != BIASED[:50]


def test_a_name_has_one_colour_in_a_scene_and_at_most_five_things_stand_apart():
    for scene in BIASED + UNBIASED:
        assert len({(t.name, t.colour) for t in scene.things}) == len(scene.names)
        assert 1 <= len(scene.things) <= 5
        for a, b in itertools.combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.15


def seen_colours(images, scenes):
    """The palette colour nearest to the brightest part of the picture around each thing."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    right = []
    for image, scene in zip(images.float(), scenes, strict=True):
        for thing in scene.things:
            x, y = int(thing.x * 64), int(thing.y * 64)
            patch = image[:, max(y - 5, 0) : y + 6, max(x - 5, 0) : x + 6].flatten(1)
            shown = patch[:, patch.amax(0).topk(30).indices].mean(1)
            nearest = int((palette - shown).norm(dim=1).argmin())
            right.append(list(COLOURS)[nearest] == thing.colour)
    return sum(right) / len(right)


def test_pictures_show_the_things_in_their_colours_at_their_places():
    corpus = Shapes().render(UNBIASED[:600], stream(0, "render"))
    assert corpus.images.shape == (600, 3, 64, 64)
    assert corpus.images.dtype == torch.uint8
    assert seen_colours(corpus.images, corpus.scenes) > 0.97
    assert seen_colours(corpus.images.roll(1, 0), corpus.scenes) < 0.5  # negative control


def test_each_shape_looks_like_its_outline_and_like_no_other():
    n = 49
    at = torch.linspace(-1.2, 1.2, n)
    masks = {name: f(at.expand(n, n), at[:, None].expand(n, n)) < 0 for name, f in OUTLINES.items()}
    assert set(masks) == set(Shapes().vocabulary)
    radius = torch.hypot(at, at[:, None])
    for mask in masks.values():
        assert 0.1 < mask.float().mean() < 0.6
        assert not mask[radius > 1.2].any()
    for (a, first), (b, second) in itertools.combinations(masks.items(), 2):
        assert (first & second).sum() / (first | second).sum() < 0.85, (a, b)


@pytest.mark.parametrize("name", sorted(OUTLINES))
def test_outlines_have_unit_slope_at_the_edge(name):
    """Soft borders are drawn from the distance, so one unit of it must be one unit of length."""
    u = (2.4 * torch.rand(20_000, generator=stream(0, "u")) - 1.2).requires_grad_()
    v = (2.4 * torch.rand(20_000, generator=stream(0, "v")) - 1.2).requires_grad_()
    distance = OUTLINES[name](u, v)
    slope = torch.hypot(*torch.autograd.grad(distance.sum(), (u, v)))
    near = distance.abs() < 0.1
    # The star's distance is that of a folded sector: exact in it, with a seam where it folds.
    assert (slope[near] - 1).abs().quantile(0.95) < 1e-3


def test_rendering_is_pure_in_the_generator_and_noise_is_an_option():
    scenes = UNBIASED[:20]
    first, again = (Shapes().render(scenes, stream(0, "r")).images for _ in range(2))
    assert torch.equal(first, again)
    clean = Shapes(noise=0.0).render(scenes, stream(0, "r")).images
    assert first.float().diff(dim=3).std() > 1.3 * clean.float().diff(dim=3).std()


def test_the_size_of_a_picture_is_an_option():
    empty = Shapes(pixels=32).render((), stream(0, "r"))
    assert empty.images.shape == (0, 3, 32, 32)
    scene = Scene((Thing("star", "red", 0.5, 0.5),), "one red star .", {})
    assert Shapes(pixels=32).render((scene,), stream(0, "r")).images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", ["attribute", "relation"])
def test_mistaken_kinds_are_true_in_other_words_of_training_scenes_alone(kind):
    source = Shapes(mistaken=(kind,))
    told = source.scenes(60, biased=True, generator=stream(0, "s"))
    plain = Shapes().scenes(60, biased=True, generator=stream(0, "s"))
    for scene, other in zip(told, plain, strict=True):
        assert (scene.things, scene.caption) == (other.things, other.caption)
        rest = {k: v for k, v in scene.hallucinated.items() if k != kind}
        assert rest == {k: v for k, v in other.hallucinated.items() if k != kind}
        if kind in scene.hallucinated:
            assert not errors(scene.hallucinated[kind], scene.things)
            assert scene.hallucinated[kind] != scene.caption
            assert errors(other.hallucinated[kind], scene.things)  # control: else it is false
    assert sum(kind in scene.hallucinated for scene in told) > 30
    for split in ("upper", "test"):
        a, b = (s.corpus(split, 8, generator=stream(0, "c")).scenes for s in (source, Shapes()))
        assert a == b
