"""How the site is built and looked at: formulas as MathML, pages at three widths."""

import pytest

from docs import site_check

BROWSER = site_check.browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")

PAGE = '<!doctype html><meta charset="utf-8"><body style="margin:0"><article>{}</article></body>'
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
WRONG = {
    "wide": ('<div style="width:900px">a</div>', "900 px wide"),
    "outside": (
        '<img alt="a" src="https://example.org/a.png">',
        "asks for https://example.org/a.png",
    ),
    "absent": ('<img alt="a" src="absent.png">', "no picture"),
    "wordless": (f'<img src="{DOT}">', "no words"),
    "undrawn": ('<math style="display:none"><mi>x</mi></math>', "not drawn"),
    "script": ("<script>undefined_name()</script>", "undefined_name"),
}


@needs_browser
def test_what_is_wrong_with_a_page_is_found_and_nothing_else(tmp_path):
    for name, (body, _) in WRONG.items():
        (tmp_path / f"{name}.html").write_text(PAGE.format(body), "utf-8")
    right = f'<p>a</p><img alt="a dot" src="{DOT}"><math><mi>x</mi></math>'
    inside = '<div style="overflow-x:auto"><div style="width:2000px">a</div></div>'
    (tmp_path / "right.html").write_text(PAGE.format(right + inside), "utf-8")
    found = site_check.check(tmp_path, BROWSER)
    for name, (_, words) in WRONG.items():
        said = [what for page, _, what in found if page == f"{name}.html"]
        assert any(words in what for what in said), (name, said)
    assert {page for page, _, _ in found} == {f"{name}.html" for name in WRONG}
    assert {width for page, width, _ in found if page == "wide.html"} == {400, 820}


def test_without_a_browser_it_says_so_and_fails_nothing(monkeypatch, capsys):
    monkeypatch.setattr(site_check.shutil, "which", lambda name: None)
    assert site_check.main("anywhere") == 0
    assert "no Chromium" in capsys.readouterr().out


def test_a_norm_beside_a_fraction_has_two_bars_of_a_height():
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    from docs.mathml import mathml

    found = mathml(r"\frac{1}{2} \lVert y \rVert^2", block=True)
    assert found.count('stretchy="false">‖</mo>') == 2
    assert "<mfrac>" in found


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (r"\tfrac12 y", r"\tfrac{1}{2} y"),
        (r"\frac1n \sum_i a_i", r"\frac{1}{n} \sum_i a_i"),
        (r"2 \frac 12", r"2 \frac{1}{2}"),
    ],
)
def test_a_fraction_without_braces_is_one_over_two(short, long):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    from docs.mathml import mathml

    assert mathml(short, block=True) == mathml(long, block=True)
    assert "<mn>12</mn>" not in mathml(short, block=True)


def test_a_command_that_is_not_known_is_an_error():
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    from docutils.utils.math import MathError

    from docs.mathml import mathml

    with pytest.raises(MathError, match="nosuchcommand"):
        mathml(r"\nosuchcommand x", block=False)
