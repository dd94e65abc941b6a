"""Which runs are meant: conditions, sorting and columns."""

import pytest

from bilevel.cli.selection import chosen, column, listed, ordered
from bilevel.errors import RecipeError
from tests.cli.commands import invoke
from tests.report.records import write


@pytest.fixture
def runs(tmp_path):
    write(tmp_path, "toy/20260101-000001-a", [2.0, 1.0], measures={"pope AUC": (0.1, 0.9)})
    write(tmp_path, "toy/20260101-000002-b", [3.0], estimator="unroll", seed=1, end="diverged")
    other = {"upper.optimizer.lr": 0.5}
    write(tmp_path, "ridge/20260101-000003-c", [0.5], settings=other, measures={"gap": (3.0, 1e-3)})
    damaged = write(tmp_path, "bad/20260101-000004-d", [0.5])
    (damaged.path / "events.jsonl").write_text("{torn\n")
    return tmp_path


def names(found) -> str:
    return "".join(each.path[-1] for each in found)


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ([], "abcd"),
        (["estimator=unroll"], "b"),
        (["estimator.name=unroll"], "b"),
        (["estimator!=unroll"], "acd"),
        (["status=done"], "ac"),
        (["status=damaged"], "d"),
        (["status=d*"], "abcd"),
        (["name=t*"], "ab"),
        (["name!=t*"], "cd"),
        (["run=ridge/*"], "c"),
        (["seed=1"], "b"),
        (["seed=1.0"], "b"),
        (["upper.optimizer.lr=0.5"], "c"),
        (["upper.optimizer.lr=5e-1"], "c"),
        (["upper.optimizer.lr<0.5"], "abd"),
        (["upper_loss<1"], "c"),
        (["upper_loss<=1"], "ac"),
        (["upper_loss>1"], "b"),
        (["upper_loss >= 1"], "ab"),
        (["lower_loss<0.5"], "c"),
        (["pope_AUC>0.5"], "a"),
        (["pope AUC>0.5"], "a"),
        (["pope>0.5"], "a"),
        (["gap<0.01", "status=done"], "c"),
        (["gap<0.01", "status!=done"], ""),
        (["problem.name=quadratic", "estimator=implicit"], "ac"),
    ],
)
def test_conditions(runs, conditions, left):
    assert names(chosen(listed(runs), conditions)) == left


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("unroll", "must be like KEY=VALUE"),
        ("=unroll", "must be like KEY=VALUE"),
        ("upper_loss<small", "< compares numbers; got 'small'"),
        ("estimatr=unroll", "Did you mean 'estimator'"),
        ("popo_AUC=1", "Did you mean 'pope_AUC'"),
        ("lr=0.5", "stands for lower.optimizer.lr, upper.optimizer.lr; write one of them"),
    ],
)
def test_a_condition_that_is_none(runs, condition, said):
    with pytest.raises(RecipeError) as error:
        chosen(listed(runs), [condition])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "descending", "order"),
    [
        ("upper_loss", False, "cabd"),
        ("-upper_loss", False, "bacd"),
        ("upper_loss", True, "bacd"),
        ("gap", False, "cabd"),  # what lacks it comes last, either way
        ("-gap", False, "cabd"),
        ("name", False, "dcab"),
        ("upper.optimizer.lr", True, "cabd"),
    ],
)
def test_sorting(runs, key, descending, order):
    assert names(ordered(listed(runs), key, descending)) == order


def test_settings_are_those_that_a_run_was_made_with(tmp_path, monkeypatch):
    made = {"seed": "4", "problem.name": '"my.py:Mine:' + "a" * 64 + '"', "upper.steps": "2"}
    write(tmp_path, "toy/a", [1.0], about={"settings": made})
    write(tmp_path, "toy/b", [1.0], seed=3)
    assert names(chosen(listed(tmp_path), ["problem=my.py:Mine"])) == "a"
    assert names(chosen(listed(tmp_path), ["seed=4"])) == "a"
    # what the numbers do not depend on is in the recipe alone
    assert names(chosen(listed(tmp_path), ["checkpoint.keep>0"])) == "ab"
    (found, _) = listed(tmp_path)
    monkeypatch.setattr(
        "bilevel.cli.selection.parse", None
    )  # and parsed only where it is asked for
    assert column([found], "seed", "--sort")(found) == 4.0
    with pytest.raises(TypeError):
        column([found], "checkpoint.keep", "--sort")


def test_numbers_are_sorted_as_numbers(tmp_path):
    for seed in (10, 9, 100):
        write(tmp_path, f"toy/{seed}", [1.0], seed=seed)
    assert [each.path for each in ordered(listed(tmp_path), "seed")] == [
        "toy/9",
        "toy/10",
        "toy/100",
    ]


def test_a_run_can_be_named_by_name_by_pattern_and_by_folder(runs):
    assert names(listed(runs, ["toy"])) == "ab"
    assert names(listed(runs, ["t*"])) == "ab"
    assert names(listed(runs, ["*/*-c"])) == "c"
    assert names(listed(runs, ["toy/20260101-000002-b", str(runs / "toy")])) == "ba"
    with pytest.raises(RecipeError, match="is not a run"):
        listed(runs, ["tuy"])
    with pytest.raises(RecipeError, match="is not a run"):
        listed(runs, ["tuy*"])


def test_no_run_has_no_column(tmp_path):
    assert ordered([], "anything") == []
    assert column([], "anything", "--sort") is not None


def test_runs_shows_what_is_asked_for(runs):
    arguments = ("runs", "--runs-dir", runs, "--where", "name=toy", "--sort", "-upper_loss")
    lines = invoke(*arguments, "--show", "pope_AUC,seed").output.splitlines()
    head, first, second = (line.split() for line in lines[:3])
    assert head[-2:] == ["pope_AUC", "seed"]
    assert [first[0][-1], *first[-2:]] == ["b", "-", "1"]
    assert [second[0][-1], *second[-2:]] == ["a", "0.9", "0"]
    assert "gap" in invoke("runs", "--runs-dir", runs, "--sort", "gap").output.splitlines()[0]
    for machine in ([], ["--json"]):
        end = invoke("runs", "--runs-dir", runs, "--sort", "", *machine, code=2)
        assert "error: --sort " in end.stderr
    assert "No run of 4 in" in invoke("runs", "--runs-dir", runs, "--where", "seed=77").output
    said = invoke("runs", "--runs-dir", runs, "--where", "seed", code=2).stderr
    assert "must be like KEY=VALUE" in said
