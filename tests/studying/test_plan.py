"""Cells in their order, what each is run with, and what waits for what; nothing is run here."""

import pytest

from bilevel.studying import page
from bilevel.studying.plan import Asked, Tuned, Waiting, tried
from bilevel.studying.results import StudyCell
from bilevel.studying.summary import findings
from bilevel.sweeping.space import parse
from tests.studying import small


@pytest.fixture
def plan(tmp_path):
    return small.made(tmp_path)


def test_tuning_comes_arm_by_arm_then_test_seeds_with_all_arms_of_one_before_the_next(plan):
    cells = list(plan.cells("easy"))
    names = [str(cell).removeprefix("easy/") for cell in cells]
    assert names[:4] == [f"direct/tune-trial0{t}-seed10{s}" for s in (0, 1) for t in (0, 1)]
    assert names[4:8] == [f"rates/tune-seed10{s}-point0{p}" for s in (0, 1) for p in (0, 1)]
    assert names[-6:] == [
        "direct/test-seed2",
        "rates/test-seed2-point00",
        "rates/test-seed2-point01",
        *(f"{arm}/test-seed2" for arm in ("mixed", "implicit", "again")),
    ]
    assert len(cells) == len(set(cells)) == 4 + 4 + 2 + 4 + 2 + 3 * 6


def test_a_regime_tuned_elsewhere_has_the_two_arms_that_were_named(plan):
    assert plan.named("easy") == plan.named("hard") == {}
    assert list(plan.cells("hard")) == []
    small.tune_all(plan)
    assert plan.named("hard") == {"ours": "implicit", "baseline": "direct"}
    arms = ("direct", "implicit")
    assert list(plan.cells("hard")) == [
        StudyCell("hard", a, "test", s) for s in range(3) for a in arms
    ]


def test_the_setting_with_the_best_mean_is_taken(plan):
    with pytest.raises(Waiting, match="easy/direct is not tuned yet"):
        plan.tuned("easy", "direct")
    small.tune(plan, "direct", 7.0, 6.0)
    values = {"upper.optimizer.lr": "0.5"}
    assert plan.tuned("hard", "direct") == Tuned(1, values, 6.0, (6.25, 5.75), 2)
    overrides = plan.overrides(StudyCell("hard", "direct", "test", 2))
    assert overrides[-5:] == [
        "problem.condition=30",
        'estimator="alternating"',
        "upper.optimizer.lr=0.5",
        "seed=2",
        "problem.data_seed=2",
    ]
    assert not any("num_upper" in each for each in overrides)  # which is of development runs
    development = plan.overrides(StudyCell("easy", "direct", "tune", 100, 0))
    assert "problem.num_upper=4" in development
    assert "upper.optimizer.lr=0.1" in development


def test_the_largest_is_best_where_the_study_says_so(tmp_path):
    plan = small.made(tmp_path, f"maximize: true\n{small.TEXT}")
    small.tune_all(plan)
    assert plan.tuned("easy", "direct").mean == 7.0
    assert plan.named("easy")["baseline"] == "direct"


def test_a_setting_that_failed_on_a_seed_is_not_taken(plan):
    small.tune(plan, "direct", 7.0, None)
    assert plan.tuned("easy", "direct").trial == 0
    small.tune(plan, "direct", None, None)
    other = small.StudyPlan(plan.study, small.Book(plan.book.folder))
    with pytest.raises(Waiting, match="every setting failed") as caught:
        other.tuned("easy", "direct")
    assert caught.value.is_final


def test_measures_of_another_arm_at_the_same_seed_are_taken_as_settings(plan):
    cell = StudyCell("easy", "again", "test", 1)
    with pytest.raises(Waiting, match="implicit is not tuned yet"):
        plan.overrides(cell)
    small.tune_all(plan, implicit=(2.0, 3.0))
    with pytest.raises(Waiting, match="easy/implicit/test-seed1 is not over"):
        plan.overrides(cell)
    small.keep(plan, StudyCell("easy", "implicit", "test", 1), 0.75)
    found = plan.overrides(cell)
    assert "problem.rho=0.75" in found  # with the words that the star stands for
    assert "upper.optimizer.lr=0.1" in found  # tuned as the other is
    tuning = plan.overrides(StudyCell("easy", "again", "tune", 100, 0))
    assert "problem.rho=2.0" in tuning  # of the trial that was taken


def test_an_arm_whose_stage_failed_never_runs(plan):
    small.tune_all(plan)
    small.keep(plan, StudyCell("easy", "implicit", "test", 1), None)
    with pytest.raises(Waiting, match="failed") as caught:
        plan.overrides(StudyCell("easy", "again", "test", 1))
    assert caught.value.is_final


def test_weights_are_those_of_the_mixture_that_was_best(plan):
    mixed = StudyCell("easy", "mixed", "test", 0)
    small.tune_all(plan)
    with pytest.raises(Waiting, match="rates/test-seed0-point00 is not over"):
        plan.overrides(mixed)
    points = [StudyCell("easy", "rates", "test", 0, point=point) for point in (0, 1)]
    for point, loss in zip(points, (2.0, 3.0), strict=True):
        small.keep(plan, point, 1.0, upper_loss=loss)

    def weights(cell):
        return [each for each in plan.overrides(cell) if each.startswith("upper.optimizer.")]

    assert weights(mixed) == weights(points[0]) != weights(points[1])
    assert sum(float(each.partition("=")[2]) for each in weights(mixed)) == pytest.approx(1)
    other = StudyCell("easy", "rates", "test", 1, point=0)
    assert weights(other) != weights(points[0])  # each seed has its own


def test_a_cell_that_was_run_with_other_settings_is_told(tmp_path, plan):
    cell = StudyCell("easy", "direct", "tune", 100, 0)
    small.keep(plan, cell, 1.0)
    assert plan.altered(cell) is None
    assert plan.altered(StudyCell("easy", "direct", "tune", 101, 0)) is None
    other = small.made(tmp_path, small.TEXT.replace("condition: 3}", "condition: 4}"))
    assert other.altered(cell) == "problem.condition=4"


def test_a_part_is_chosen_by_regime_arm_seed_and_phase():
    cell = StudyCell("easy", "direct", "tune", 100, 0)
    assert cell in Asked()
    assert cell in Asked(("tune",), ("easy",), ("direct", "mixed"), (100, 101))
    for other in (
        Asked(phases=("test",)),
        Asked(regimes=("hard",)),
        Asked(arms=("mixed",)),
        Asked(seeds=(101,)),
    ):
        assert cell not in other


def test_what_is_tried_is_the_grid_or_some_of_it_and_always_the_same():
    space, _ = parse(["a=1..3,int", "b=x,y"])
    grid = tried(space, 6, 0)
    assert grid == [{"a": str(a), "b": b} for a in (1, 2, 3) for b in "xy"]
    some = tried(space, 4, 0)
    assert some == tried(space, 4, 0) != tried(space, 4, 1)
    assert len({tuple(each.items()) for each in some}) == 4
    assert all(each in grid for each in some)
    assert tried([], 9, 0) == [{}]
    pytest.importorskip("optuna")
    space, _ = parse(["a=1e-3..1,log", "b=x,y"])
    drawn = tried(space, 5, 0)
    assert drawn == tried(space, 5, 0) != tried(space, 5, 1)
    assert all(1e-3 <= float(each["a"]) <= 1 for each in drawn)


EXPLORATORY = small.TEXT.partition("  hard:")[0].replace("at: 3}", "test: [], arms: [direct]}")
EXPLORATORY += "arms:\n  direct" + small.TEXT.partition("arms:\n  direct")[2]


def test_a_regime_without_test_seeds_shows_what_its_arms_came_to(tmp_path):
    """At the tuned setting (the second: 6 and not 7), in the mean over development seeds; with test seeds there is no such column."""
    for text in (EXPLORATORY, small.TEXT):
        plan = small.made(tmp_path, text)
        for trial, mean in enumerate((7.0, 6.0)):
            for seed, other in zip(small.DEVELOPMENT, (1.0, 4.0), strict=True):
                cell = StudyCell("easy", "direct", "tune", seed, trial)
                small.keep(plan, cell, mean, beside=other + trial)
        (row, *_) = small.tables(plan)[0].rows
        shown = page.filled(
            "<!-- study:tuned -->\n<!-- /study:tuned -->", plan.study, findings(plan), [], ""
        )
        if text is small.TEXT:
            assert (row.looked_at, "beside" in shown) == ({}, False)
        else:
            assert row.looked_at == {"upper value": 6.0, "beside": 3.5}
            assert "| development seeds | beside |" in shown
            assert "| 6 (6, 6) | 3.5 |" in shown
