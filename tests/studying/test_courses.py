"""The way of measures that are weights: kept at every evaluation, and told as shares and distances."""

import pytest

from bilevel.runfolder import record
from bilevel.studying import figure, page_parts
from bilevel.studying.courses import courses, late
from bilevel.studying.results import Kept, StudyCell, collect
from tests.studying import small

WEIGHTS = {"step": [0, 2, 4], "w_a": [1, 2, 1], "w_b": [1, 1, 1], "w_c": [2, 1, 0]}


@pytest.fixture
def plan(tmp_path):
    text = small.TEXT.replace(
        "easy: {title: well conditioned, settings: {problem.condition: 3}, at: 3}",
        "easy: {title: well conditioned, settings: {problem.condition: 3}, test: [], arms: [direct], "
        "course: {wrong: [w_c], right: ['w_[ab]']}}",
    ).partition("  hard:")
    arms = text[2].partition("arms:\n  direct")
    return small.made(tmp_path, f"{text[0]}arms:\n  direct{arms[2]}")


def keep(plan, seed, course):
    cell = StudyCell("easy", "direct", "tune", seed, 0)
    overrides = tuple(plan.overrides(cell))
    kept = Kept("done", overrides, {"upper value": 1.0}, {}, 1.0, course=course)
    plan.book.keep(cell, kept)


def test_shares_and_distances_of_a_run(plan):
    keep(plan, 100, WEIGHTS)
    (found,) = courses(small.StudyPlan(plan.study, small.Book(plan.book.folder)))
    assert (found.regime, found.arm, found.missing) == ("easy", "direct", 1)
    (way,) = found.ways
    assert way.steps == (0, 2, 4)
    assert way.shares["wrong"] == (0.5, 0.25, 0.0)
    assert way.shares["right"] == (0.5, 0.75, 1.0)
    # ¼, ¼, ½ to ½, ¼, ¼ to ½, ½, 0
    assert (way.moved, way.length) == (0.5, 0.5)
    assert late(way, "wrong") == 0.125
    keep(plan, 101, {**WEIGHTS, "w_a": [1, 2, 1], "w_c": [2, 1, 2]})  # which comes back
    _, back = courses(plan)[0].ways
    assert (back.moved, back.length) == (0.0, 0.5)


def test_the_page_and_the_figure_have_them_or_say_what_is_missing(plan):
    assert "not yet computed. Cells that it rests on and that are not there: 2 of `direct`" in (
        page_parts.courses(courses(plan))
    )
    assert figure.courses(courses(plan)) is None
    keep(plan, 100, WEIGHTS)
    said = page_parts.courses(courses(plan))
    assert "| arm | wrong: begin → end | right: begin → end |" in said
    assert "(1 not yet computed) | 0.50 → 0.00 (0.00) | 0.50 → 1.00 (1.00) | 0.12 | 0.88 |" in said
    pytest.importorskip("matplotlib")
    (axes,) = figure.courses(courses(plan)).axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes.get_lines()}
    assert (ends["wrong"], ends["right"]) == (0.0, 1.0)


def test_a_regime_of_development_seeds_alone_has_no_test_cells(plan):
    assert {cell.phase for cell in plan.all()} == {"tune"}
    assert [*plan.all()]


def test_what_a_run_keeps_of_its_way(tmp_path):
    stepped = {"event": "stepped", "step": 4, "upper_loss": 2.0, "lower_loss": 0.5, "seconds": 0.1}
    stepped |= {"hypergradient_norm": 1.0, "estimate": {}, "totals": {"gradients": 7.0}}
    events = [
        {"event": "evaluated", "step": 0, "metrics": {"m": 1.0, "w_a": 0.123456789, "w_b": 1}},
        stepped,
        {"event": "evaluated", "step": 4, "metrics": {"m": 2.0, "w_a": 0.5, "w_b": 1, "w_c": 1}},
        {"event": "finished", "step": 4, "reason": "done", "seconds": 1.0},
    ]
    (tmp_path / record.FILE).write_text("".join(map(record.line, events)), "utf-8")
    found = collect(tmp_path, "m", [], None, ["w_*"])
    assert found.measures["m"] == 2.0
    assert found.course == {"step": [0, 4], "w_a": [0.12346, 0.5], "w_b": [1.0, 1.0]}
    assert collect(tmp_path, "m", [], None).course is None
    with pytest.raises(ValueError, match="course: the run has no measure v_"):
        collect(tmp_path, "m", [], None, ["v_*"])
    events[0]["metrics"]["w_a"] = -1.0
    (tmp_path / record.FILE).write_text("".join(map(record.line, events)), "utf-8")
    with pytest.raises(ValueError, match="course: w_a is not a weight: -1"):
        collect(tmp_path, "m", [], None, ["w_*"])
