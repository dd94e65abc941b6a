"""Measures of embeddings: any dtype, any number, no NaN, memory that grows with n alone."""

import math

import pytest
import torch

from bilevel.errors import ConvergenceError
from bilevel_problems.mllm_hft.evaluation import geometry
from bilevel_problems.mllm_hft.evaluation.measures import (
    alignment,
    centroid_distance,
    gap,
    linear_probe,
    preference,
    recall_at_1,
    silhouette,
    uniformity,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(dtype, n=30, k=2):
    image, text, false = (draw(n, 8, seed=1), draw(n, 8, seed=2), draw(n, k, 8, seed=3))
    present = torch.ones(n, k, dtype=torch.bool)
    parts = (part.to(dtype) for part in (image, text, false))
    return gap(*parts, present, [str(i) for i in range(n)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_measure_takes_every_dtype(dtype):
    got, expected = everything(dtype), everything(torch.float64)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        # bfloat16 keeps 8 bits of an entry; a rank or a share may move by a few pairs
        assert value == pytest.approx(expected[name], abs=0.05), name


@pytest.mark.parametrize("block", [1, 7, 512])
def test_blocks_change_nothing(monkeypatch, block):
    first, second = draw(23, 5, seed=1), draw(14, 5, seed=2) + 1
    points = torch.nn.functional.normalize(torch.cat([first, second]).double(), dim=-1)
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    scores = []
    for i in range(37):
        mine = range(23) if i < 23 else range(23, 37)
        rest = range(23, 37) if i < 23 else range(23)
        a = sum(float(far[i, j]) for j in mine) / (len(mine) - 1)
        b = sum(float(far[i, j]) for j in rest) / len(rest)
        scores.append((b - a) / max(a, b))
    pairs = [float(far[i, j]) for i in range(37) for j in range(i)]
    spread = math.log(sum(math.exp(-2 * d * d) for d in pairs) / len(pairs))
    monkeypatch.setattr(geometry, "BLOCK", block)
    assert silhouette(first, second) == pytest.approx(sum(scores) / 37, rel=1e-9)
    assert uniformity(torch.cat([first, second])) == pytest.approx(spread, rel=1e-9)
    assert recall_at_1(first, first.clone(), [str(i) for i in range(23)]) == 1.0


def test_no_distance_matrix_of_all_pairs_is_made():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    n = 3000
    with Watch():
        silhouette(draw(n, 3), draw(n, 3, seed=1))
    assert max(sizes) <= geometry.BLOCK * 2 * n < (2 * n) ** 2 / 4
    assert max(sizes) >= geometry.BLOCK * n  # negative control: the products were watched


def test_too_few_points_are_documented_values():
    one, none = draw(1, 4), draw(0, 4)
    assert silhouette(one, one) == 0.0
    assert silhouette(one, none) == silhouette(none, none) == 0.0
    assert uniformity(one) == uniformity(none) == 0.0
    assert alignment(none, none) == centroid_distance(none, one) == 0.0
    assert recall_at_1(none, none, []) == 0.0
    empty = torch.zeros(1, 2, dtype=torch.bool)
    assert preference(one, one, draw(1, 2, 4), empty) == 0.5
    assert linear_probe(one, draw(1, 2, 4), ~empty) == 0.5
    measured = gap(one, one, draw(1, 2, 4), ~empty, ["a"])
    assert all(math.isfinite(value) for value in measured.values())


@pytest.mark.parametrize("kinds", [0, 2])
def test_nothing_is_measured_of_hallucinated_captions_that_are_not_there(kinds):
    given = draw(3, 4), draw(3, 4, seed=1), draw(3, kinds, 4, seed=2)
    captions = ["a", "b", "c"]
    measured = gap(*given, torch.zeros(3, kinds, dtype=torch.bool), captions)
    whole = gap(*given[:2], draw(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), captions)
    left_out = {name for name in whole if "hallucinated" in name}
    assert len(left_out) == 4
    assert measured.keys() == whole.keys() - left_out
    assert all(measured[name] == whole[name] for name in measured)


def test_a_single_point_beside_a_cluster_counts_as_zero():
    cluster = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    alone = torch.tensor([[0.0, 1.0]])
    assert silhouette(cluster, alone) == pytest.approx(3 / 4)


def test_collapsed_embeddings_have_no_silhouette_of_rounding():
    point = draw(1, 64).expand(20, 64)
    assert silhouette(point, point * 3) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "measure",
    [
        lambda a, b: silhouette(a, b),
        lambda a, b: uniformity(a),
        lambda a, b: alignment(a, b),
        lambda a, b: centroid_distance(a, b),
        lambda a, b: recall_at_1(a, b, list("abcd")),
        lambda a, b: preference(b, a, b[:, None], torch.ones(4, 1).bool()),
        lambda a, b: linear_probe(a, b[:, None], torch.ones(4, 1).bool()),
    ],
)
def test_embeddings_that_are_no_numbers_are_refused(measure, bad):
    broken = draw(4, 3)
    broken[2, 1] = bad
    with pytest.raises(ConvergenceError, match=r"1 of \d embeddings"):
        measure(broken, draw(4, 3))
    measure(draw(4, 3), draw(4, 3))


def test_equal_captions_tie_exactly():
    image, text = draw(50, 96), draw(50, 96, seed=1)
    present = torch.ones(50, 1, dtype=torch.bool)
    assert preference(image, text, text[:, None], present) == 0.5


@pytest.mark.parametrize("width", [4, 200])  # fewer and more features than captions
def test_the_probe_finds_a_planted_direction_and_nothing_else(width):
    n, k = 60, 2
    text, false = draw(n, width, seed=1), draw(n, k, width, seed=2)
    present = torch.ones(n, k, dtype=torch.bool)
    shift = torch.zeros(width)
    shift[1] = width**0.5
    assert linear_probe(text - shift, false + shift, present) > 0.95
    chance = linear_probe(text, false, present)
    assert abs(chance - 0.5) < 4 * 0.5 / math.sqrt(n)


def test_the_probe_is_scored_on_pictures_it_did_not_see():
    """With more features than captions any labels can be fitted: in-sample it would be 1."""
    text, false = draw(20, 500, seed=1), draw(20, 1, 500, seed=2)
    assert linear_probe(text, false, torch.ones(20, 1).bool()) < 0.85


def test_the_probe_leaves_absent_kinds_out():
    text, false = draw(40, 3, seed=1), draw(40, 2, 3, seed=2)
    false[:, 1] += 50  # would be told apart at once
    present = torch.tensor([[True, False]]).expand(40, 2)
    assert linear_probe(text, false, present) == linear_probe(text, false[:, :1], present[:, :1])
