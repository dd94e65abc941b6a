"""Arms: what is one arm, what each is called, and what is left out."""

import pytest

from bilevel.report.arms import differing, named, select
from tests.report.records import write

A, B = '"sgd"', '"adam"'


@pytest.mark.parametrize(
    ("recipes", "names"),
    [
        ([{"lr": "0.1"}, {"lr": "0.01"}], ["lr=0.1", "lr=0.01"]),
        # options that follow from the name of their component are not told
        (
            [
                {"estimator.name": '"implicit"', "estimator.damping": "0.0"},
                {"estimator.name": '"unroll"', "estimator.last": "null"},
            ],
            ["estimator=implicit", "estimator=unroll"],
        ),
        # but those that differ beside the name are
        (
            [
                {"estimator.name": '"implicit"', "estimator.damping": "0.0"},
                {"estimator.name": '"implicit"', "estimator.damping": "0.1"},
                {"estimator.name": '"unroll"'},
            ],
            [
                "estimator=implicit damping=0.0",
                "estimator=implicit damping=0.1",
                "estimator=unroll",
            ],
        ),
        # the last word of a key, unless two would be the same
        (
            [
                {"lower.optimizer.lr": "1", "upper.optimizer.lr": "1"},
                {"lower.optimizer.lr": "2", "upper.optimizer.lr": "1"},
                {"lower.optimizer.lr": "1", "upper.optimizer.lr": "2"},
            ],
            [
                "lower.optimizer.lr=1 upper.optimizer.lr=1",
                "lower.optimizer.lr=2 upper.optimizer.lr=1",
                "lower.optimizer.lr=1 upper.optimizer.lr=2",
            ],
        ),
        # long names are cut to what tells the arms apart
        (
            [
                {"problem.a_rather_long_option": '"one"', "problem.another_long_option": '"one"'},
                {"problem.a_rather_long_option": '"two"', "problem.another_long_option": '"two"'},
            ],
            ["a_rather_long_option=one", "a_rather_long_option=two"],
        ),
        # a file that was edited between the runs
        (
            [{"problem.name": f'"my.py:Mine:{digit * 64}"'} for digit in "ab"],
            ["problem=my.py:Mine (aaaaaa)", "problem=my.py:Mine (bbbbbb)"],
        ),
        ([{}, {"lr": "1"}], ["without these settings", "lr=1"]),
    ],
)
def test_an_arm_is_called_by_what_differs(recipes, names):
    assert named(recipes) == names
    assert len(set(names)) == len(names)


def test_what_all_have_does_not_differ():
    recipes = [{"a": "1", "b": "1"}, {"a": "1", "b": "2"}, {"a": "1"}]
    assert differing(recipes) == ["b"]
    assert differing(recipes[:1]) == []


def test_runs_that_differ_in_the_seed_alone_are_one_arm(tmp_path):
    folders = [write(tmp_path, f"toy/{seed}", [1.0], seed=seed) for seed in range(3)]
    folders.append(write(tmp_path, "toy/other", [1.0], settings={"upper.optimizer.lr": 0.5}))
    folders.append(write(tmp_path, "toy/named", [1.0], seed=7, settings={"sinks": []}))
    found = select(folders)
    assert [[run.seed for run in arm.runs] for arm in found.arms] == [["0", "1", "2", "7"], ["0"]]
    assert [arm.name for arm in found.arms] == ["lr=0.01", "lr=0.5"]


def test_more_steps_are_another_arm(tmp_path):
    folders = [write(tmp_path, f"toy/{n}", [1.0], settings={"upper.steps": n}) for n in (5, 6)]
    assert [arm.name for arm in select(folders).arms] == ["steps=5", "steps=6"]


def test_a_repeated_run_counts_once(tmp_path):
    """Or the interval of identical numbers would be too narrow."""
    stopped = write(tmp_path, "toy/3", [1.0, 1.0], end=None)
    old, new = (write(tmp_path, f"toy/{n}", [1.0]) for n in (1, 2))
    found = select([old, new, stopped])
    assert [run.folder for arm in found.arms for run in arm.runs] == [new]
    assert {run.folder for run in found.repeated} == {old, stopped}


def test_the_settings_that_a_run_was_made_with_count(tmp_path):
    """Not those of its files as they are now."""
    made = {"seed": "0", "problem.name": '"my.py:Mine:' + "a" * 64 + '"'}
    one = write(tmp_path, "toy/1", [1.0], about={"settings": made})
    two = write(tmp_path, "toy/2", [1.0], about={"settings": made | {"seed": "1"}})
    other = made | {"problem.name": made["problem.name"].replace("a" * 64, "b" * 64)}
    three = write(tmp_path, "toy/3", [1.0], about={"settings": other})
    assert [len(arm.runs) for arm in select([one, two, three]).arms] == [2, 1]


def test_a_damaged_run_costs_its_own_row(tmp_path):
    whole, torn, cut, empty = (write(tmp_path, f"toy/{n}", [1.0], seed=n) for n in range(4))
    (torn.path / "events.jsonl").write_text("{torn\n")
    cut.resolved.write_text("seed: 0\n")
    (empty.path / "events.jsonl").unlink()
    found = select([whole, torn, cut, empty])
    assert [run.folder for arm in found.arms for run in arm.runs] == [whole]
    assert set(found.damaged) == {str(folder.path) for folder in (torn, cut, empty)}
    assert "not an event" in found.damaged[str(torn.path)]
    assert "lacks" in found.damaged[str(cut.path)]
