"""The pictures of the site show what the library computes today."""

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from bilevel import registry
from bilevel.registry import presets
from bilevel.registry.build import build
from bilevel.sinks.svg import numbered
from docs.pages import put
from docs.pictures import PICTURES, choice, keep, panel

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


def test_names_of_clip_paths_do_not_depend_on_last_digits():
    """What CPUs with other instructions round otherwise is no other picture; another use of a name is."""
    one = '<clipPath id="pdd53304dba"/><a u="url(#pdd53304dba)"/><b id="m8a29d0efc5"/>'
    assert numbered(one) == '<clipPath id="p0"/><a u="url(#p0)"/><b id="m1"/>'
    assert numbered(one) == numbered(one.replace("pdd53304dba", "p8a29d0efc5"))
    other = one.replace("#pdd53304dba", "#p8a29d0efc5")
    assert numbered(one) != numbered(other)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_has_both_schemes_and_no_date(name):
    text = (keep.HERE / f"{name}.svg").read_text("utf-8")
    assert len(text) < 150_000
    assert "prefers-color-scheme: dark" in text
    assert "<dc:date>" not in text
    assert ET.fromstring(text).find(".//{*}title").text == PICTURES[name].title


REQUEST = re.compile(r"""(?:src|href|url\()\s*=?\s*["'(]?https?:""")


def test_no_picture_asks_the_network_for_anything():
    texts = {name: (keep.HERE / f"{name}.svg").read_text("utf-8") for name in NAMES}
    assert [name for name, text in texts.items() if REQUEST.search(text)] == []
    console = Console(file=io.StringIO(), record=True)
    console.print("a")
    assert REQUEST.search(console.export_svg())  # rich's own, which asks for a font


@pytest.mark.parametrize("width", panel.WIDTHS)
def test_the_panel_is_as_wide_as_it_says(width):
    drawn = ET.fromstring(keep.picture_of(f"panel_{width}", PICTURES[f"panel_{width}"]))
    texts = [text for text in drawn.findall(".//{*}text") if (text.text or "").strip()]
    lines = {}
    for text in texts:
        end = (float(text.get("x")) + float(text.get("textLength"))) / 12.2  # of a character
        lines[text.get("y")] = max(lines.get(text.get("y"), 0), end)
    said = "".join(text.text for text in texts)
    assert len(lines) == 6  # bar, F, G, evidence in two, the warning
    assert max(lines.values()) == pytest.approx(width, abs=0.5)  # which is cut there
    assert all(word in said for word in ("80/120", "ETA", "F", "G", "‖dΦ/dx‖", "adj.res"))


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


def test_the_list_of_choices_is_that_of_the_picture():
    page = keep.HERE.parent / "choosing.md"
    text = page.read_text("utf-8")
    assert put(text, "the list", choice.listing()) == text, "run python -m docs.pictures choice"


@pytest.mark.parametrize("question", [*choice.QUESTIONS, choice.LAST], ids=lambda q: q.page)
def test_a_choice_leads_to_what_there_is(question):
    known = {*registry.names("estimators"), *presets.of("estimators")}
    assert set(question.names) <= known
    text = (keep.HERE.parent / "estimators" / f"{question.page}.md").read_text("utf-8")
    assert [name for name in question.names if name not in text] == []


def needs(name):
    return build("estimators", name).needs


def test_choices_keep_to_what_estimators_say_they_need():
    leaf = {question.page: question.names for question in choice.QUESTIONS}
    restrictions = {"project_lower", "prox_lower", "lower_constraints", "lower_map"}
    for name in leaf["constrained"]:
        assert needs(name).supports & restrictions
    assert not needs("implicit").supports & restrictions  # which the question before it keeps away
    for name in (*leaf["penalty"], *leaf["zeroth_order"]):
        assert not needs(name).second_order
    assert needs("implicit").second_order
    for name in (*leaf["simple_bilevel"], *leaf["stochastic"]):
        assert needs(name).moves_lower
    assert needs(*leaf["unroll"]).path == math.inf
