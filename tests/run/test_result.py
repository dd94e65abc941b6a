"""How the result of `minimize` is shown: text in a terminal, a table and curves in a notebook."""

import re
import sys
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
from matplotlib.figure import Figure

import bilevel
from bilevel import notebook
from bilevel.optimizers import SGD
from bilevel.run.result import Result
from tests.run.setups import EXACT, Plain


class Measured(Plain):
    def evaluate(self, x, y):
        return {"x & <y>": float(x["x"] + y["y"])}


def page(result):
    """The texts and the tags of what a notebook shows; every tag that is opened is closed."""
    texts, tags, opened = [], [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            if tag not in ("br", "img"):
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            tags.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

        def handle_data(self, data):
            texts.append(data)

    reader = Reader()
    reader.feed(result._repr_html_())
    reader.close()
    assert not opened
    return texts, tags


def test_printed_it_is_a_table():
    # x = 3, 2, 1.5 before the steps: F = (x − 1)², dΦ/dx = 2 (x − 1), and G before its one step
    lines = repr(bilevel.minimize(Plain(), steps=3, **EXACT)).splitlines()
    assert lines[0] == "Plain: done after 3 of 3 steps"
    assert [line.split() for line in lines[1:5]] == [
        ["before", "after"],
        ["upper", "loss", "F", "4", "0.25"],
        ["lower", "loss", "G", "9", "0.25"],
        ["‖dΦ/dx‖", "4", "1"],
    ]
    assert re.match(r"\d+ gradients, \d+ HVPs, 3 cross products in ", lines[5])
    assert len({len(line) for line in lines[1:5]}) == 1  # columns that end together


def test_measures_the_control_and_warnings_stand_in_it():
    def evaluated(**options):
        lower = {"name": "gradient", "steps": 1, "optimizer": {"name": "sgd", "lr": 0.5}}
        return bilevel.minimize(
            Measured(), lower=lower, upper=SGD(lr=0.25), steps=2, progress=False, **options
        )

    held = repr(evaluated(evaluate_held=True)).splitlines()
    assert held[1].split() == ["before", "x", "held", "after"]
    # x = 3, then 2, then 1.5; y starts at 0 and is solved before each step of x
    assert held[5].split() == ["x", "&", "<y>", "3", "6", "3.5"]
    assert repr(evaluated()).splitlines()[5].split() == ["x", "&", "<y>", "3", "3.5"]
    best = evaluated(evaluate_every=1, best={"measure": "x & <y>", "mode": "min"})
    assert f"best at step {best.best.step}: see .best" in repr(best)


class Interrupted(Measured):
    """Ctrl-C in the fourth step."""

    def upper_batches(self, stream):
        yield from [None] * 3
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("every", "at", "cells"), [(2, 2, ["3", "3.5 at step 2"]), (0, 0, ["3", "-"])]
)
def test_measures_of_an_interrupted_run_say_of_which_step_they_are(every, at, cells):
    warned = f"^interrupted after 3 of 9 steps; the measures are those of step {at}$"
    with pytest.warns(UserWarning, match=warned):
        result = bilevel.minimize(Interrupted(), steps=9, evaluate_every=every, **EXACT)
    assert re.split("  +", repr(result).splitlines()[5]) == ["x & <y>", *cells]
    assert cells[-1] in page(result)[0]
    assert result.measured_at == result.evaluations[-1].step == at
    assert result.metrics == result.evaluations[-1].metrics
    with pytest.warns(UserWarning, match="^interrupted after 3 of 9 steps$"):
        whole = bilevel.minimize(Interrupted(), steps=9, evaluate_every=3, **EXACT)
    assert whole.measured_at == 3
    assert "at step" not in repr(whole)


def test_a_notebook_has_the_same_numbers_and_the_curves():
    result = bilevel.minimize(Measured(), steps=3, **EXACT)
    texts, tags = page(result)
    said = " ".join(" ".join(texts).split())
    for number in re.findall(r"\S+", "\n".join(repr(result).splitlines()[2:5])):
        assert number in said
    assert "x & <y>" in texts  # written, not a tag
    assert tags.count("svg") == (3 if find_spec("vl_convert") else 0)
    shown = result._repr_html_()
    assert "<script" not in shown
    assert not [url for url in re.findall(r"https?://[^\"' ]+", shown) if "www.w3.org" not in url]
    assert set(re.findall(r'fill="(?!none)([^"]+)"', shown)) <= {"currentColor"}


def test_without_the_extra_there_is_the_table(monkeypatch):
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # an import of it would fail
    texts, tags = page(bilevel.minimize(Plain(), steps=2, **EXACT))
    assert "svg" not in tags
    assert "upper loss F" in texts


def test_the_figures_of_a_problem_are_shown():
    class Drawing(Plain):
        def figures(self, x, y):
            return {'a "figure"': Figure(figsize=(1, 1))}

    _, tags = page(bilevel.minimize(Drawing(), steps=1, **EXACT))
    assert tags.count("img") == 1


def test_no_step_is_one_line():
    run = bilevel.iterate(Plain(), steps=3)
    result = run.result()
    assert isinstance(result, Result)
    assert repr(result) == "Plain: unfinished after 0 of 3 steps"
    assert result._repr_html_() == "<p>Plain: unfinished after 0 of 3 steps</p>"


def test_a_curve_is_thinned_and_keeps_its_ends():
    curve = [(float(n), float(n % 7)) for n in range(3000)]
    found = notebook._thinned(curve)
    assert (found[0], found[-1]) == (curve[0], curve[-1])
    assert len(found) <= notebook.POINTS + 1
    with_gaps = [(0.0, float("nan")), (1.0, 2.0), (2.0, float("inf"))]
    assert notebook._thinned(with_gaps) == [(1.0, 2.0)]


@pytest.mark.parametrize(("ends", "kind"), [((1, 99), False), ((1, 101), True), ((0, 101), False)])
def test_what_spans_two_decades_is_on_a_logarithmic_scale(ends, kind):
    scale = notebook._chart("F", list(enumerate(ends)))["encoding"]["y"]["scale"]
    assert (scale.get("type") == "log") is kind
