"""The figure of the flagship study's set-up says what the study's file has."""

import pytest

from bilevel.studying import file as files
from docs import study_setup as setup


@pytest.fixture(scope="module")
def content():
    return files.read(setup.STUDY).content


def test_its_words_are_those_of_the_file(content):
    common, own, clean = setup.groups(content)
    assert common.title.startswith("24 sources of 1,000 pictures\n")
    assert common.title.endswith("of strength 0.8 to 1")
    assert own.title.startswith("8 sources of 1,000\n")
    assert clean.title.startswith("64 clean pictures")
    assert own.source.pairing
    assert [group.is_biased for group in (common, own, clean)] == [True, True, False]
    changed = {**content.settings, "problem.upper": 512}  # negative control
    other = setup.groups(type(content)(**{**vars(content), "settings": changed}))
    assert other[2].title.startswith("512 clean pictures")


def test_it_is_drawn_with_three_pictures_and_the_pairs_of_each(content):
    pytest.importorskip("matplotlib")
    figure = setup.composed(content, scenes=20)
    assert len(figure.axes) == 3 * (setup.SHOWN + 1) + 1
    said = "\n".join(text.get_text() for text in figure.axes[-1].texts)
    assert "each of 32 sources at its weight" in said
    assert "2,000 unbiased test pictures" in said


def test_the_page_shows_it():
    assert setup.FILE.is_file()
    page = (setup.HERE / "study.md").read_text("utf-8")
    assert f"](study/{setup.FILE.name})" in page
