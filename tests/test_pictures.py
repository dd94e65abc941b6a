"""The pictures of the site show what the library computes today."""

import json
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import pytest

from docs.pictures import PICTURES, keep

ROOT = Path(__file__).parent.parent
NAMES = list(PICTURES)
PINNED = f"matplotlib=={version('matplotlib')}" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.untrusted("pictures show where methods fail")
@pytest.mark.parametrize("name", NAMES)
def test_its_numbers_are_those_of_today(name):
    picture = PICTURES[name]
    found = (picture.part or picture.compute)()
    assert list(keep.differences(found, keep.data_of(name))) == [], "run python -m docs.pictures"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_drawn_from_them(name):
    drawn = keep.picture_of(name, PICTURES[name])
    if PINNED:  # another matplotlib draws other bytes
        assert drawn == (keep.HERE / f"{name}.svg").read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_has_both_schemes_and_no_date(name):
    text = (keep.HERE / f"{name}.svg").read_text("utf-8")
    assert len(text) < 150_000
    assert "prefers-color-scheme: dark" in text
    assert "<dc:date>" not in text
    assert ET.fromstring(text).find(".//{*}title").text == PICTURES[name].title


def test_every_kept_file_belongs_to_a_picture_that_a_page_shows():
    kept = {path.stem for path in keep.HERE.iterdir() if path.suffix in (".svg", ".json")}
    assert kept == set(PICTURES)
    pages = "".join(page.read_text("utf-8") for page in keep.HERE.parent.rglob("*.md"))
    assert [name for name in PICTURES if f"pictures/{name}.svg)" not in pages] == []


def test_numbers_that_moved_are_found():
    kept = {"a": [1.0, 2.0, 1e-12], "b": "x"}
    assert not list(keep.differences(kept, json.loads(json.dumps(kept))))
    assert not list(keep.differences({"a": [1.001, 2.0]}, kept))
    assert list(keep.differences({"a": [1.0, 2.1]}, kept)) == ["/a/1: 2.1, kept is 2"]
    assert list(keep.differences({"a": [1.0, 2.0, 1e-3]}, kept))
    assert list(keep.differences({"c": 1.0}, kept)) == ["/c: not kept"]
    assert list(keep.differences({"a": [1.0] * 4}, kept))
    assert list(keep.differences({"b": "y"}, kept))
