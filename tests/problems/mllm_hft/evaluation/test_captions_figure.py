"""What is said of a picture, and which of its words are marked."""

from __future__ import annotations

import pytest
import torch

from bilevel_problems.mllm_hft.evaluation.captions_figure import (
    LINES,
    RED,
    WIDTH,
    Described,
    captions_figure,
    drawable,
    lines,
)
from bilevel_problems.mllm_hft.sources.mentions import Lexicon

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib")
LEXICON = Lexicon(("dog", "cat", "traffic light"))


def test_words_that_name_objects_are_marked_by_what_is_there():
    (words,) = lines("Two dogs,  a cat.", {"dog"}, LEXICON)
    assert [(word.column, word.text, word.right) for word in words] == [
        (0, "Two ", None),
        (4, "dogs", True),
        (8, ", a ", None),
        (12, "cat", False),
        (15, ".", None),
    ]


def test_a_mention_over_two_lines_is_marked_in_both():
    text = "x" * (WIDTH - 8) + " traffic light"
    first, second = lines(text, {"dog"}, LEXICON)
    assert first[-1][1:] == ("traffic", False)
    assert second[0] == (0, "light", False)


def test_nothing_said_is_said():
    ((word,),) = lines("", {"dog"}, LEXICON)
    assert word == (0, "(nothing)", None)


def test_every_caption_stands_beside_its_picture_and_lies_in_boxes():
    picture = torch.zeros(3, 8, 12, dtype=torch.uint8)
    said = {"before": "a cat " * 60, "after": "a dog"}
    figure = captions_figure([Described(picture, {"dog"}, said)] * 3, LEXICON, "three of them")
    pictures, texts = figure.axes[::2], figure.axes[1::2]
    assert len(pictures) == len(texts) == 3
    written = [t for t in texts[0].texts if t.get_text() in ("cat", "dog", "…")]
    boxed = [t for t in written if t.get_bbox_patch() is not None]
    assert {t.get_text() for t in boxed} == {"cat"}
    assert all(t.get_color() == RED for t in boxed)
    assert [t.get_text() for t in written].count("…") == 1  # the long one was cut
    assert deepest(texts[0]) >= -2 * LINES * 1.3 * 8.0


def deepest(axis) -> float:
    return min(text.get_position()[1] for text in axis.texts)


@pytest.mark.parametrize("models", [2, 4])
def test_captions_that_are_all_too_long_stay_in_the_room_of_their_picture(models):
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    said = {f"model {i}": "a cat " * 90 for i in range(models)}
    figure = captions_figure([Described(picture, {"dog"}, said)], LEXICON, "one")
    text = figure.axes[1]
    assert deepest(text) == pytest.approx(-models * LINES * 1.3 * 8.0)
    room = text.get_position().height * figure.get_figheight() * 72  # points
    assert -deepest(text) <= room
    written = [one.get_text() for one in text.texts]
    assert written.count("…") == models
    assert written.count("cat") > 2 * models  # each has its say before it is cut


def test_what_a_model_says_is_drawn_whatever_it_is(tmp_path):
    """No formula between two dollars, no warning of a glyph that the font lacks."""
    picture = torch.zeros(3, 8, 12, dtype=torch.uint8)
    said = {"before": "a $cat$ \u3107 and l\u0300 \U0001f436", "after": "a dog"}
    figure = captions_figure([Described(picture, {"dog"}, said)], LEXICON, "")
    figure.savefig(tmp_path / "figure.png")
    assert drawable("a dog …") == "a dog …"
    assert drawable("\u3107l\u0300") == "\N{REPLACEMENT CHARACTER}l\N{REPLACEMENT CHARACTER}"
