"""What a batch holds, and what it does not hold twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bilevel.errors import ProblemError
from bilevel.rng import stream
from bilevel_problems.mllm_hft.batches import (
    Data,
    contrast_batch,
    drawn,
    joined,
    numbered,
    origin_numbers,
    origins,
    others,
    task_batch,
)
from bilevel_problems.mllm_hft.evaluation.evaluation_split import captions
from bilevel_problems.mllm_hft.models.instructions import texts
from bilevel_problems.mllm_hft.models.pictures import Pictures
from bilevel_problems.mllm_hft.models.tokenizer import WordTokenizer
from bilevel_problems.mllm_hft.sources.pictures import PictureFiles
from bilevel_problems.mllm_hft.sources.protocol import Corpus, Scene
from bilevel_problems.mllm_hft.sources.shapes import Shapes

WORDS = WordTokenizer(["one", "two", "three", "red", "blue", "circle", "square"])


def scene(caption: str, wrong: str | None = None) -> Scene:
    return Scene((), caption, {"object": wrong} if wrong else {})


def data(size: int, origin: torch.Tensor | None = None) -> Data:
    lines = ["one red circle", "two blue square"] * size
    return Data(
        Pictures(torch.arange(size).float()[:, None, None]),
        texts(lines[:size], WORDS),
        captions(tuple(scene(line, "three square") for line in lines[:size]), Shapes(), WORDS),
        torch.arange(size),
        origin,
    )


@pytest.mark.parametrize("draw", [task_batch, contrast_batch])
def test_a_batch_holds_no_picture_twice_where_there_are_enough(draw):
    for seed in range(20):
        seen = draw(data(6), 5, stream(seed, "b"))["features"].flatten().tolist()
        assert len(set(seen)) == 5
    with_replacement = draw(data(6), 7, stream(0, "b"))["features"].flatten().tolist()
    assert len(with_replacement) == 7 > len(set(with_replacement))


def test_scenes_are_drawn_evenly():
    source = stream(0, "even")
    counts = torch.zeros(10)
    for _ in range(1000):
        counts += torch.bincount(drawn(10, 4, source), minlength=10)
    # A scene is in a batch with probability 0.4: 400 ± √(1000 · 0.4 · 0.6) = 15.5, four of them.
    assert (counts - 400).abs().max() < 62


def test_each_origin_gives_as_many_as_another_whatever_its_size():
    origin = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)
    extra = torch.zeros(3)
    for seed in range(300):
        found = task_batch(data(20, origin), 7, stream(seed, "b"))
        assert torch.equal(found["origin"], origin[found["features"].flatten().long()])
        counts = torch.bincount(found["origin"], minlength=3)
        assert sorted(counts.tolist()) == [2, 2, 3]
        extra += counts - 2
    # Each origin gives the third picture with probability 1/3: 100 ± √(300 · 2/9) = 8.2, four of them.
    assert (extra - 100).abs().max() < 33
    assert "origin" not in task_batch(data(6), 2, stream(0, "b"))


def test_rows_without_an_origin_say_so_beside_those_with_one():
    mixed = joined(
        [
            task_batch(data(4, torch.tensor([0, 1, 0, 1])), 2, stream(0, "b")),
            task_batch(data(4), 3, stream(1, "b")),
        ]
    )
    assert sorted(mixed["origin"][:2].tolist()) == [0, 1]
    assert mixed["origin"][2:].tolist() == [-1, -1, -1]
    assert "origin" not in joined([task_batch(data(4), 3, stream(1, "b"))])


def test_origins_are_numbered_in_order_of_appearance():
    scenes = [Scene((), "a", {}, origin=name) for name in ("web", "books", "web")]
    assert origins(scenes) == ("web", "books")
    assert origin_numbers(scenes).tolist() == [0, 1, 0]
    assert origins(scenes[:1]) == ()
    assert origin_numbers(scenes[:1]) is None


def test_a_batch_says_which_picture_and_what_is_no_negative():
    batch = contrast_batch(data(4), 3, stream(0, "b"))
    picture = batch["picture"]
    assert torch.equal(picture.float(), batch["features"].flatten())
    # Pictures of one parity have one caption; the only lie is about an object.
    apart = picture[:, None] % 2 != picture % 2
    assert torch.equal(batch["against"].pairs, apart)
    assert batch["against"].hallucinated.sum(-1).tolist() == [1, 1, 1]
    whole = contrast_batch(data(4), 3, stream(0, "b"), "batch")["against"].hallucinated
    assert whole.sum((1, 2)).tolist() == [3, 3, 3]


def test_others_are_different_and_not_taken():
    taken = torch.tensor([1, 4, 5])
    source = stream(0, "others")
    seven = torch.ones(7, dtype=torch.bool)
    seen = {tuple(sorted(others(seven, taken, 3, source).tolist())) for _ in range(60)}
    assert seen == {(0, 2, 3), (0, 2, 6), (0, 3, 6), (2, 3, 6)}
    with pytest.raises(ProblemError, match=r"problem\.queue = 5: .*, 4 of 7 .* must be at most 4"):
        others(seven, taken, 5, source)
    seven[0] = False  # without a caption
    assert sorted(others(seven, taken, 3, source).tolist()) == [2, 3, 6]


@pytest.mark.parametrize("origin", [None, torch.tensor([0, 0, 0, 1, 1, 1])])
def test_a_picture_without_a_caption_is_in_no_contrast(origin):
    """Its hallucinated caption would be the negative of an empty text."""
    whole = data(6, origin)
    scenes = [scene(line, "three square") for line in ["one red circle", "", "two blue square"] * 2]
    some = replace(whole, captions=captions(tuple(scenes), Shapes(), WORDS))
    for seed in range(20):
        batch = contrast_batch(some, 4, stream(seed, "b"))
        assert sorted(batch["picture"].tolist()) == [0, 2, 3, 5]
        assert batch["mask"][:, 0].sum(1).min() > 1  # more than the end token
    seen = {i for seed in range(20) for i in contrast_batch(whole, 4, stream(seed, "b"))["picture"]}
    assert {1, 4} <= {int(i) for i in seen}  # negative control: with a caption they are drawn
    asked = [task_batch(some, 6, stream(0, "b"))["features"].flatten().long().tolist()]
    assert sorted(asked[0]) == list(range(6))  # the task may ask about them


def test_a_contrast_without_any_caption_is_refused():
    mute = replace(data(3), captions=captions((scene("", "one circle"),) * 3, Shapes(), WORDS))
    with pytest.raises(ProblemError, match="no training picture has a caption"):
        contrast_batch(mute, 2, stream(0, "b"))
    assert task_batch(mute, 2, stream(0, "b"))


def test_lines_that_read_the_same_have_one_number():
    """Widths differ, and where a kind is missing the true caption stands in its place."""
    scenes = (
        scene("one red circle", "two square"),
        scene("two square", "one red circle"),
        scene("two square square"),
        scene("one red circle", "one red"),
    )
    found = captions(scenes, Shapes(), WORDS).line
    kind = Shapes().kinds.index("object") + 1
    a, b, c = found[0, 0], found[1, 0], found[2, 0]
    assert len({int(a), int(b), int(c)}) == 3
    assert (found[0, kind], found[1, kind], found[3, 0]) == (b, a, a)
    assert found[3, kind] not in (a, b, c)
    assert (found[2] == c).all()


def test_scenes_about_one_file_share_its_number(tmp_path: Path):
    files = []
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
        files.append(tmp_path / name)
    first, second = files
    pictures = PictureFiles.of([first, second, first])
    scenes = tuple(scene("one") for _ in range(3))
    assert numbered(Corpus(scenes, pictures)).tolist() == [0, 1, 0]
    blank = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    assert numbered(Corpus(scenes, blank)).tolist() == [0, 1, 2]
