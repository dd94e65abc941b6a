"""A study's file that is wrong: what, where, what was expected; all at once."""

import pytest

from bilevel.cli.names import shipped_studies
from bilevel.errors import RecipeError
from bilevel.studying import file as files
from bilevel.studying.file import arms_of, words
from bilevel.studying.plan import Waiting
from tests.studying import small


def test_a_file_is_read(tmp_path):
    study = files.read(small.lay(tmp_path))
    assert (study.name, study.development) == ("small", (100, 101))
    assert study.test == {"easy": (0, 1, 2), "hard": (0, 1, 2)}
    assert study.tuning("hard") == study.tuning("easy") == "easy"
    assert [each.key for each in study.spaces["implicit"]] == ["upper.optimizer.lr"]
    assert words({"a.b": {"c": 1e-5}, "d": None}) == {"a.b": '{"c": 1e-05}', "d": "null"}


def test_paths_may_be_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = small.TEXT
    for key in ("recipe", "results", "page"):
        text = text.replace(f"\n{key}: ", f"\n{key}: ~/mine/")
    study = files.read(small.lay(tmp_path, text.replace("~/mine/quadratic", "~/quadratic")))
    assert study.results == tmp_path / "mine" / "results"
    assert study.page == tmp_path / "mine" / "page.md"
    assert study.recipe == tmp_path / "quadratic.yaml"


def test_arms_come_with_those_they_come_after(tmp_path):
    text = small.TEXT.replace("arms: [ours, baseline]", "arms: [again, mixed]")
    content = files.read(small.lay(tmp_path, text)).content
    assert arms_of(content, "hard", {}) == ["rates", "mixed", "implicit", "again"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("margin: 0.5", "margin: -1", r"small.yaml:6: margin = -1; must be ≥ 0"),
        ("margin: 0.5", "marign: 1", r"small.yaml:6: marign: unknown key. Did you mean 'margin'\?"),
        ("measure: upper value\n", "", r"measure: missing"),
        ("test: 0..2", "test: 99..101", r"seeds.test = '99..101'; 100 is a development seed too"),
        ("development: 100..101", "development: x", "seeds.development = 'x'; must be like"),
        ("tuned: easy", "tuned: esay", r"small.yaml:\d+: regimes.hard.tuned: 'esay'.*'easy'"),
        ("tuned: easy, arms", "arms", r"ours is named in the regime of `tuned`, which is missing"),
        ("[ours, baseline]", "[our, baseline]", r"regimes.hard.arms: 'our'.*'ours'"),
        ("after: {arm: rates, choose: best}", "after: {arm: rates, take: {a: b}}", "give choose"),
        ("{arm: rates, choose: best}", "{arm: direct, choose: best}", "one run: give take"),
        ("{arm: rates, choose: best}", "{arm: again, take: {a: b}}", "it must stand above it"),
        ("problem.*ho", "problem.rho", r"one \* on both sides"),
        (
            "results: ",
            "results: '' # ",
            r"small.yaml:\d+: results = ''; must name a file or a folder",
        ),
        ("page: ", "page: '' # ", r"small.yaml:\d+: page = ''; must name a file or a folder"),
        ("hidden: true\n", "hidden: false\n", "tries weights alone"),
        ("0.1,0.5", "0.1", r"arms.direct.vary: 'upper.optimizer.lr=0.1' varies nothing"),
        ("0.1,0.5", "2..1", "the smaller end first"),
        ("tuned: implicit", 'tuned: implicit\n    vary: ["a=1,2"]', "stands beside vary"),
        ("  direct:\n", "  di/rect:\n", "it names a folder"),
        ("group: ours", "group: {}", r"arms.implicit.group = \{\}; must be text"),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: agian, at_least: 1}",
            r"small.yaml:7: headroom.bound: 'agian'.*'again'",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: again, over: basline, at_least: 1}",
            r"headroom.over: 'basline'.*'baseline'",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: ours, over: ours, at_least: 1}",
            r"headroom.over: 'ours'",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: implicit, over: ours, at_least: 1}",
            r"headroom.over: 'ours'",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: baseline, over: direct, at_least: 1}",
            r"headroom.over: 'direct'",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nheadroom: {bound: again, regime: hard, at_least: 1}",
            r"headroom.regime: 'hard': unknown regime that is tuned by itself",
        ),
        (
            "margin: 0.5",
            "margin: 0.5\nreplaces: {run: implicit, sweep: dirct}",
            r"replaces.sweep: 'dirct'.*'direct'",
        ),
        ("name: small", "name: small\nversion: 2", "this release reads version 1"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(tmp_path, old, new, said):
    assert old in small.TEXT
    with pytest.raises(RecipeError, match=said):
        files.read(small.lay(tmp_path, small.TEXT.replace(old, new, 1)))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    text = small.TEXT.replace("margin: 0.5", "margin: -1").replace("trials: 2", "trials: 0")
    with pytest.raises(RecipeError, match=r"2 errors\n.*margin.*\n.*trials"):
        files.read(small.lay(tmp_path, text))


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_right(name):
    """The settings of every arm in every regime, as far as they rest on no run, make a recipe."""
    plan = small.plan_of(shipped_studies()[name])
    first = {(cell.regime, cell.arm): cell for cell in reversed(list(plan.all()))}
    for cell in first.values():
        try:
            overrides = plan.overrides(cell)
        except Waiting:
            continue
        plan.study.load(overrides)
