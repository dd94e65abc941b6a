"""Optuna's side: the same trials as plain Optuna, resumed or not; importance; what was left by the dead."""

import math

import pytest

from bilevel import recipe as recipes
from bilevel.errors import CheckpointError, RecipeError
from bilevel.sweeping import drive, request, result, study
from bilevel.sweeping.space import parse
from tests.sweeping.plain import QUADRATIC, WORDS, objective, plain

optuna = pytest.importorskip("optuna")


def asked(sampler="tpe", words=WORDS, **options):
    varied, fixed = parse(words)
    defaults = {"measure": "upper_loss", "maximize": False, "pruner": "none", "sampler_seed": 3}
    recipe = recipes.load(QUADRATIC, fixed)
    return request.Request(recipe, tuple(varied), sampler=sampler, **(defaults | options))


def driver(made, folder, trials, value=objective, **options):
    """A driver of a closed-form objective in the place of a run."""

    def start(spec):
        found = value(spec["values"])
        place = folder / "trials" / f"{spec['number']:04d}"
        drive.write_result(
            place, {"status": "done", "value": found, "half": None, "seeds": [found], "seconds": 0}
        )
        return drive.Over()

    return drive.Driver(made, folder, study.study(made, folder), start, trials, **options)


def values(made, folder):
    rows = sorted(result.rows(study.study(made, folder), made.maximize), key=lambda row: row.number)
    return [(row.values, row.value) for row in rows]


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_trials_are_those_of_plain_optuna(sampler, maximize, tmp_path):
    made = asked(sampler, maximize=maximize)
    list(driver(made, tmp_path, 14).run())
    truth = plain(sampler, maximize, 14)
    assert values(made, tmp_path) == [(trial.params, trial.value) for trial in truth.trials]
    best = result.rows(study.study(made, tmp_path), maximize)[0]
    assert best.value == truth.best_value
    other = plain(sampler, maximize, 14, seed=4)  # control: the seed matters
    assert values(made, tmp_path) != [(trial.params, trial.value) for trial in other.trials]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_that_was_stopped_goes_on_as_if_never(sampler, tmp_path):
    made = asked(sampler)
    for trials in (1, 7, 13, 14):
        list(driver(made, tmp_path, trials).run())
    truth = plain(sampler, False, 14)
    assert values(made, tmp_path) == [(trial.params, trial.value) for trial in truth.trials]


def test_a_trial_whose_driver_died_is_taken_up_and_one_that_is_held_is_not(tmp_path):
    made = asked("random")
    first = driver(made, tmp_path, 2)
    for _ in range(2):
        first.study.ask(study.distributions(made.space))
    broken = first.study.ask()  # killed before its values stood in the journal
    place = tmp_path / "trials" / "0001"
    place.mkdir(parents=True)
    with result_lock(place):
        list(driver(made, tmp_path, 3).run())
        states = {r.number: r.status for r in result.rows(first.study, False)}
        assert states == {0: "done", 1: "running", broken.number: "failed"}
    list(driver(made, tmp_path, 3).run())
    rows = {row.number: row for row in result.rows(first.study, False)}
    assert rows[1].status == "done"
    assert rows[1].value == objective(rows[1].values)
    assert rows[broken.number].reason == "killed as it was made"


def test_the_end_of_a_line_that_a_kill_left_costs_that_line_alone(tmp_path):
    made = asked("random")
    list(driver(made, tmp_path, 7).run())
    journal = tmp_path / study.JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,"worker')
    list(driver(made, tmp_path, 14).run())
    truth = plain("random", False, 14)
    assert values(made, tmp_path) == [(trial.params, trial.value) for trial in truth.trials]
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], "not JSON", *lines[2:], ""]))
    with pytest.raises(CheckpointError, match=r"journal\.log:3: is damaged .*take the line out"):
        driver(made, tmp_path, 14)


def result_lock(place):
    from bilevel.runfolder import RunFolder

    return RunFolder(place).lock()


def test_two_drivers_share_a_journal(tmp_path):
    made = asked("grid")
    one, two = driver(made, tmp_path, 14), driver(made, tmp_path, 14)
    steps = [one.run(), two.run()]
    while steps:
        steps = [each for each in steps if next(each, steps) is not steps]
    found = [tuple(each.items()) for each, _ in values(made, tmp_path)]
    assert len(found) == len(set(found)) == 14


def test_a_failure_is_kept_and_stops_where_that_is_asked(tmp_path):
    made = asked("random")

    def start(spec):
        status = "failed" if spec["number"] == 1 else "done"
        place = tmp_path / "trials" / f"{spec['number']:04d}"
        drive.write_result(place, {"status": status, "value": 1.0, "reason": "because"})
        return drive.Over()

    made_driver = driver(made, tmp_path, 5, stops_on_error=True)
    made_driver.start = start
    list(made_driver.run())
    assert [row.status for row in result.rows(made_driver.study, False)] == ["done", "failed"]
    made_driver = driver(made, tmp_path, 5)
    made_driver.start = start
    list(made_driver.run())
    rows = result.rows(made_driver.study, False)
    assert [row.status for row in rows] == ["done"] * 4 + ["failed"]
    assert rows[-1].reason == "because"


def test_importance_is_that_of_the_setting_that_matters(tmp_path):
    words = ["upper.optimizer.lr=0.01..1", "estimator.damping=0..1"]
    made = asked("random", words)
    found = driver(made, tmp_path, 16, value=lambda v: math.log(v["upper.optimizer.lr"]) ** 2)
    assert study.importance(found.study) == {}
    list(found.run())
    shares = study.importance(found.study)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["upper.optimizer.lr"] > 0.9


def test_another_sweep_in_the_folder_is_refused_with_what_differs(tmp_path):
    request.keep(asked(), tmp_path)
    request.keep(asked(), tmp_path)
    for other, said in [
        (asked(measure="lower_loss"), 'measure is "upper_loss" there and "lower_loss" here'),
        (asked("random"), 'sampler is "tpe" there'),
        (asked(words=[*WORDS, "upper.steps=9"]), "recipe.upper.steps is 200 there and 9 here"),
        (asked(words=["upper.optimizer.lr=0.01..2,log"]), "high"),
    ]:
        with pytest.raises(RecipeError, match="holds another sweep") as caught:
            request.keep(other, tmp_path)
        assert said in str(caught.value)
        assert "name=quadratic2" in str(caught.value)
