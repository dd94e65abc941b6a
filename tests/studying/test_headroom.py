"""Whether there is anything to be gained is computed from development cells, and holds back test cells until it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bilevel.studying import page_parts
from bilevel.studying.headroom import HeadroomFound, headroom
from bilevel.studying.results import Book, StudyCell
from tests.cli.commands import invoke
from tests.studying import small

TEST = StudyCell("easy", "direct", "test", 0)
TUNE = StudyCell("easy", "direct", "tune", 100, 0)
OTHER = StudyCell("hard", "direct", "tune", 100, 0)


def asking(at_least, over="baseline"):
    gate = f"headroom: {{bound: again, over: {over}, at_least: {at_least}}}"
    return small.TEXT.replace("margin: 0.5", f"margin: 0.5\n{gate}")


def found(plan):
    gate = headroom(plan)
    assert gate is not None
    return gate


def test_a_study_that_asks_for_none_has_none(tmp_path):
    assert headroom(small.made(tmp_path)) is None


def test_what_is_missing_is_the_bound_the_baselines_and_what_they_rest_on(tmp_path):
    plan = small.made(tmp_path, asking(1))
    gate = found(plan)
    assert (gate.verdict, gate.mean, gate.over) == ("not yet computed", None, "baseline")
    assert gate.said.endswith(
        "cells are missing, 4 of direct, 4 of rates, 2 of mixed, 4 of implicit, 2 of again"
    )
    assert (gate.holds(TEST), gate.holds(TUNE), gate.holds(OTHER)) == (True, False, False)
    small.tune(plan, "direct", 7.0, 6.0)
    assert "direct" not in found(plan).said
    (tmp_path / "one").mkdir()
    alone = found(small.made(tmp_path / "one", asking(1, over="direct")))
    assert {cell.arm for cell in alone.missing} == {"direct", "implicit", "again"}


@pytest.mark.parametrize(
    ("at_least", "way", "verdict", "mean", "held"),
    [
        (3.5, "", "met", 3.5, (False, False, False)),
        (3.51, "", "not met", 3.5, (True, False, True)),
        (1, "maximize: true\n", "not met", -4.5, (True, False, True)),  # control: the other way
    ],
)
def test_the_bound_must_be_ahead_of_the_best_baseline(at_least, way, verdict, mean, held, tmp_path):
    """6 of `direct`, which is the smallest, against 2.5; where the largest is best, 7 against 2.5."""
    plan = small.made(tmp_path, way + asking(at_least))
    small.tune_all(plan)
    gate = found(plan)
    assert (gate.verdict, gate.mean, gate.over) == (verdict, mean, "direct")
    assert gate.differences == (mean, mean)
    assert (gate.holds(TEST), gate.holds(TUNE), gate.holds(OTHER)) == held


@pytest.mark.parametrize(("at_least", "verdict"), [(3.6, "not met"), (3.5, "not yet computed")])
def test_one_baseline_that_the_bound_is_too_little_ahead_of_says_no_for_all(
    at_least, verdict, tmp_path
):
    """6 of `direct` against 2.5: `mixed` can only bring the difference down."""
    plan = small.made(tmp_path, asking(at_least))
    small.tune(plan, "direct", 7.0, 6.0)
    for trial, mean in enumerate((3.0, 2.0)):
        for seed in small.DEVELOPMENT:
            small.keep(plan, StudyCell("easy", "implicit", "tune", seed, trial), mean)
    assert found(plan).verdict == "not yet computed"  # the bound itself is missing
    small.tune(plan, "again", 2.5)
    gate = found(plan)
    assert gate.verdict == verdict
    assert {cell.arm for cell in gate.missing} == {"rates", "mixed"}
    if verdict == "not met":
        assert (gate.over, gate.mean) == ("direct", 3.5)
        said = page_parts.headroom(gate)
        assert (
            "can only lower it. Cells that it rests on and that are not there: 4 of `rates`" in said
        )
    small.tune_all(plan)
    assert found(plan).verdict == ("met" if at_least == 3.5 else "not met")


def test_a_regime_that_is_only_looked_at_is_not_held(tmp_path):
    text = asking(9).replace("arms:\n  direct", "  look: {test: []}\narms:\n  direct")
    plan = small.made(tmp_path, text)
    small.tune_all(plan)
    gate = found(plan)
    assert (gate.verdict, gate.exploratory) == ("not met", ("look",))
    assert not gate.holds(StudyCell("look", "direct", "tune", 100, 0))
    assert gate.holds(OTHER)


def test_a_bound_may_be_the_best_of_a_group(tmp_path):
    """`implicit` at 2 is the better bound of two; until `again` is there nothing is known."""
    text = asking(3.9).replace("bound: again", "bound: far")
    text = text.replace("group: ours", "group: far").replace("again:\n", "again:\n    group: far\n")
    text = text.replace("arms: [ours, baseline]", "arms: [direct]")
    plan = small.made(tmp_path, text)
    small.tune_all(plan)
    gate = found(plan)
    assert (gate.bound, gate.over, gate.mean, gate.verdict) == ("implicit", "direct", 4.0, "met")
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "again", "tune", seed, 0))
    gate = found(small.StudyPlan(plan.study, Book(plan.book.folder)))
    assert (gate.bound, gate.verdict) == ("far", "not yet computed")
    assert "the best of far is to be ahead of the best of baseline by 3.9" in gate.said


def test_an_arm_that_passes_the_bound_is_told(tmp_path):
    """`implicit` at 2 is better than the bound `again` at 2.5, on both seeds by as much; less is better here."""
    plan = small.made(tmp_path, asking(4))
    small.tune_all(plan)
    gate = found(plan)
    assert gate.passed == {"implicit": pytest.approx((0.75, 0.25))}
    assert gate.mean == pytest.approx(3.5)
    assert gate.error == pytest.approx(0.0)
    assert "`implicit`, an arm that is no bound, is ahead of it by +0.5" in page_parts.headroom(
        gate
    )
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "again", "tune", seed, 0))
    small.tune(plan, "again", 1.5)  # control: a bound that is none the worse
    assert found(small.StudyPlan(plan.study, Book(plan.book.folder))).passed == {}


def test_the_error_is_that_of_the_mean_over_seeds():
    """Differences of 1, 2 and 6: a deviation of √7 over √3 seeds."""
    gate = HeadroomFound("easy", "far", "near", 1.0, (1.0, 2.0, 6.0), (), None, 0)
    assert gate.error == pytest.approx((7 / 3) ** 0.5)
    assert "by +3 ± 1.5 (+1, +2, +6;" in page_parts.headroom(gate)
    one = replace(gate, differences=(1.0,))
    assert one.error is None
    assert "by +1 (+1; " in page_parts.headroom(one)


def test_a_bound_that_failed_says_nothing(tmp_path):
    plan = small.made(tmp_path, asking(1))
    small.tune_all(plan)
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "again", "tune", seed, 0))
    small.tune(plan, "again", None)
    gate = found(small.StudyPlan(plan.study, Book(plan.book.folder)))
    assert gate.verdict == "failed"
    assert "easy/again: every setting failed" in gate.said
    assert gate.holds(TEST)


def test_test_seeds_are_refused_until_it_is_met_and_run_all_the_same_where_that_is_asked(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plan = small.made(tmp_path, asking(4))
    words = ("study", "small.yaml", "--workers", "0", "--arm", "direct", "--seeds", "0")
    refused = invoke(*words, "--phase", "test", code=2).stderr
    assert (
        "small.yaml: headroom not yet computed: again is to be ahead of the best of baseline"
        in refused
    )
    small.tune_all(plan)
    refused = invoke(*words, "--phase", "test", code=2).stderr
    assert (
        "headroom not met: again is to be ahead of direct by 4 in easy, and is by +3.5" in refused
    )
    assert "--without-headroom" in refused
    assert not plan.book.path(TEST).exists()
    shown = invoke("study", "small.yaml", "--no-run")
    assert "headroom not met" in shown.output
    page = Path("page.md")
    said = page.read_text()
    assert (
        "**No headroom was found in easy**: the bound `again` is ahead of `direct` by +3.5" in said
    )
    assert "at least 4 was asked for, so no test seed is run." in said
    assert "| 3 | easy | 0 of 3 | – | held back |" in said
    invoke(*words, "--regime", "easy", "--without-headroom")
    assert json.loads(plan.book.path(TEST).read_text())["note"] == "headroom not met"
    said = page.read_text()
    assert (
        "**Not met**: the bound `again` is ahead of `direct` by +3.5 ± 0 (+3.5, +3.5; ± is" in said
    )
    assert "1 cells were run before it was met" in said
    assert "at least 4 was asked for; 1 cells were run all the same." in said
    plan.book.drop(TEST)
    small.lay(tmp_path, asking(1))  # control: where it is met nothing is held
    told = json.loads(invoke(*words, "--regime", "easy", "--phase", "test", "--json").stdout)
    assert (told["headroom"]["verdict"], told["headroom"]["early"]) == ("met", 0)
    assert "note" not in json.loads(plan.book.path(TEST).read_text())


def test_a_driver_leaves_what_is_held_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.lay(tmp_path, asking(1))
    words = ("study", "small.yaml", "--workers", "0", "--regime", "easy", "--arm", "direct")
    said = invoke(*words, "--seeds", "100,0").output
    assert (
        "1 cell waits: headroom not yet computed: again is to be ahead of the best of baseline"
        in " ".join(said.split())
    )
    assert sorted(path.name for path in Path("results").rglob("*.json")) == [
        "tune-trial00-seed100.json",
        "tune-trial01-seed100.json",
    ]
