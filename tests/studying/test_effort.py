"""What a run is worth in runs of a sweep, and what tuning cost: against enumeration, on made-up cells."""

from itertools import combinations
from statistics import fmean

import pytest

from bilevel.studying import costs, page_parts
from bilevel.studying.effort import expected_best, fewest, replaced
from bilevel.studying.headroom import HeadroomFound
from bilevel.studying.results import StudyCell
from tests.studying import small

VALUES = [0.3, 0.9, 0.5, 0.5, 0.1]


@pytest.mark.parametrize("maximize", [True, False])
def test_the_expected_best_is_the_mean_over_all_choices(maximize):
    best = max if maximize else min
    expected = [
        fmean(best(chosen) for chosen in combinations(VALUES, n)) for n in range(1, len(VALUES) + 1)
    ]
    assert expected_best(VALUES, maximize) == pytest.approx(expected, rel=1e-12)
    assert expected_best(VALUES, not maximize) != pytest.approx(expected, rel=1e-3)  # control


def test_the_fewest_are_those_that_reach_the_level():
    rising = (0.5, 0.7, 0.8)
    assert [fewest(level, rising, True) for level in (0.5, 0.51, 0.8, 0.81)] == [1, 2, 3, None]
    assert [fewest(-level, [-v for v in rising], False) for level in (0.51, 0.81)] == [2, None]


def asking(tmp_path, run, sweep):
    gate = f"replaces: {{run: {run}, sweep: {sweep}}}"
    return small.made(tmp_path, small.TEXT.replace("margin: 0.5", f"margin: 0.5\n{gate}"))


def test_runs_of_the_sweep_are_counted_and_what_they_take(tmp_path):
    """`implicit` comes to 4 and 2; `direct` to 7 and 3, of which the better is taken in half of the choices."""
    plan = asking(tmp_path, "implicit", "direct")
    found = replaced(plan)
    assert found is not None
    assert (found.missing, found.levels) == ({"direct": 4, "implicit": 4}, ())
    said = page_parts.replaces(found)
    assert said.startswith("**Not yet computed**: one run of `implicit` against a sweep of")
    assert "4 of `direct`, 4 of `implicit`" in said
    small.tune_all(plan, implicit=(4.0, 2.0))
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "direct", "tune", seed, 1))
    small.tune(plan, "direct", 7.0, 3.0)
    found = replaced(plan)
    assert found is not None
    chosen, any_of_them = found.levels
    assert (chosen.value, chosen.runs, chosen.by_seed) == (2.0, None, (None, None))
    assert (any_of_them.value, any_of_them.runs) == (3.0, 2)
    assert any_of_them.by_seed == (None, 2)  # 3.25 and 2.75 of `direct` against 3 of the other
    assert found.efforts[1].best == (5.0, 3.0)
    said = page_parts.replaces(found)
    assert (
        "| `implicit`, the best of 2 settings | 2 | more than 2 | more than 2, more than 2 |"
        in said
    )
    assert "| `implicit`, any of 2 settings | 3 | 2 | more than 2, 2 | 10 / 20 |" in said
    assert "| 10 / > 20 |" in said  # where it is not reached all of them are the least


def test_settings_that_failed_are_left_out_and_an_arm_of_none_says_nothing(tmp_path):
    plan = asking(tmp_path, "implicit", "direct")
    small.tune_all(plan)
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "direct", "tune", seed, 0))
    small.tune(plan, "direct", None)
    found = replaced(plan)
    assert found is not None
    assert found.efforts[1].best == (6.0,)
    for seed in small.DEVELOPMENT:
        plan.book.drop(StudyCell("easy", "direct", "tune", seed, 1))
    small.tune(plan, "direct", None, None)
    found = replaced(plan)
    assert found is not None
    assert found.levels == ()
    assert page_parts.replaces(found).startswith("**Cannot be computed**")


def test_tuning_costs_what_was_computed_for_it_with_its_stages(tmp_path):
    plan = small.made(tmp_path)
    assert costs.tuning(plan, "easy", "direct") is None
    small.tune_all(plan)
    tuned = costs.tuning(plan, "easy", "mixed")
    assert tuned is not None
    assert (tuned.runs, tuned.gradients, tuned.seconds) == (6, 60, 9)  # two, and four mixtures
    assert costs.tuning(plan, "easy", "again") is None  # which takes what was tuned of another
    assert costs.tuning(plan, "hard", "direct") is None
    one = costs.a_run(plan, [StudyCell("easy", "again", "tune", 100, 0)])
    assert one is not None
    assert (one.runs, one.gradients) == (2, 20)  # with the setting that was taken before it
    assert costs.a_run(plan, []) is None


def test_a_row_along_the_axis_has_a_verdict_once_all_its_seeds_are_over(tmp_path):
    plan = small.made(tmp_path)

    def shown(gate=None):
        tables = small.tables(plan)
        return page_parts.crossover(plan.study, tables, dict.fromkeys(("easy", "hard"), "D"), gate)

    assert "| 3 | easy | 0 of 3 | D | not yet computed |" in shown()
    assert shown().endswith("Not yet computed at 3, 30.\n")
    small.tune_all(plan)
    for seed in range(3):
        for arm, value in (("direct", 9.0), ("implicit", 1.0)):
            small.keep(plan, StudyCell("hard", arm, "test", seed), value + seed / 10)
    assert "| condition | regime | seeds | implicit − direct | verdict |" in shown()
    assert "| 30 | hard | 3 of 3 | D | win |" in shown()
    assert shown().endswith("Not yet computed at 3; win at 30.\n")
    plan.book.drop(StudyCell("hard", "direct", "test", 2))
    assert "| 30 | hard | 2 of 3 | D | not yet computed |" in shown()  # control
    gate = HeadroomFound("easy", "far", "near", 1.0, (0.5,), (), None, 0)  # not met
    assert "| 3 | easy | 0 of 3 | D | held back |" in shown(gate)
    assert "| 30 | hard | 2 of 3 | D | not yet computed |" in shown(gate)  # begun all the same
