"""`--json`: standard output is one JSON document, or one a line, whatever happens. `--quiet`: the end alone."""

import json
import subprocess
import sys

import pytest

from bilevel.cli import answer as module
from bilevel.comparing import cell, files, launch
from bilevel.runfolder import record
from tests.cli.commands import SHORT, invoke, run
from tests.report.records import write

LOUD = """
from bilevel_problems.quadratic import Quadratic
from bilevel import component

@component
class Loud(Quadratic):
    def lower_loss(self, x, y, batch):
        print("in the way")
        return super().lower_loss(x, y, batch)

@component
class Broken(Quadratic):
    def lower_loss(self, x, y, batch):
        raise ValueError("no loss today")
"""


def documents(*arguments, code=0) -> list[dict]:
    """What stands on each line of standard output; every line parses, strictly."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = invoke(*arguments, "--json", code=code)
    return [json.loads(line, parse_constant=refuse) for line in result.stdout.splitlines()]


def document(*arguments, code=0) -> dict:
    (found,) = documents(*arguments, code=code)
    assert (found["error"] is None) == (code == 0)
    if code:
        assert found["error"]["exit_code"] == code
        assert found["error"]["message"]
    return found


def test_ls():
    found = document("ls")["kinds"]
    assert {"problems", "estimators", "recipes"} <= set(found)
    by_name = {each["name"]: each for each in document("ls", "estimators")["kinds"]["estimators"]}
    assert by_name["implicit"]["preset"] is False
    assert by_name["soba"]["preset"] is True
    assert by_name["implicit"]["summary"]
    assert "unknown kind" in document("ls", "nothing", code=2)["error"]["message"]


def test_validate():
    found = document("validate", "quadratic")
    assert found["valid"] is True
    assert len(found["hash"]) == 64
    found = document("validate", "quadratic", "upper.steps=-1", "seed=x", code=2)
    assert found["valid"] is False
    assert [line.split("'")[1] for line in found["problems"]] == ["upper.steps=-1", "seed=x"]
    assert found["error"]["kind"] == "RecipeError"
    assert document("validate", "no_such_recipe", code=2)["file"] is None


def test_runs(tmp_path):
    assert document("runs", "--runs-dir", tmp_path)["runs"] == []
    write(tmp_path, "toy/a", [1.0], measures={"gap": (1.0, float("nan"))}, seed=3)
    write(tmp_path, "toy/b", [0.5], estimator="unroll")
    bad = write(tmp_path, "toy/c", [0.5])
    (bad.path / "events.jsonl").write_text("{torn\n")
    found = document("runs", "--runs-dir", tmp_path, "--sort", "upper_loss")["runs"]
    assert [each["run"] for each in found] == ["toy/b", "toy/a", "toy/c"]
    assert found[1]["measures"]["gap"] == "NaN"
    assert found[1]["settings"]["seed"] == 3
    assert found[2]["status"] == "damaged"
    (one,) = document("runs", "--runs-dir", tmp_path, "--where", "estimator=unroll")["runs"]
    assert one["run"] == "toy/b"
    document("runs", "--runs-dir", tmp_path, "--where", "nonsense", code=2)
    document("runs", "--runs-dir", tmp_path, "--watch", code=2)


def test_run_says_each_event_as_the_record_has_it(runs):
    *events, last = documents("run", "quadratic", *SHORT, "--runs-dir", runs)
    (folder,) = runs.glob("*/*")
    recorded = list(record.read(folder))
    assert events == [json.loads(record.line(event)) for event in recorded]
    assert last["event"] == "result"
    assert last["error"] is None
    (found,) = last["runs"]
    assert (found["run"], found["status"], found["step"]) == (str(folder), "done", 4)
    assert found["measures"] == recorded[-3]["metrics"] == events[-3]["metrics"]
    assert found["report"] is None
    *_, last = documents("resume", folder, code=2)
    assert "this run is done" in last["error"]["message"]


def test_a_dry_run_has_the_recipe(runs):
    found = document("run", "quadratic", "seed=5", "--dry-run", "--runs-dir", runs)
    assert found["recipe"]["seed"] == 5
    assert not runs.exists()


def test_a_run_that_diverges_parses_to_its_end(runs):
    words = ("upper.optimizer={name: sgd, lr: 1e200}", "lower.steps=2", "report=false")
    *events, last = documents("run", "quadratic", *words, "--runs-dir", runs, code=5)
    assert events[-1]["reason"] == "diverged"
    assert last["error"]["kind"] == "ConvergenceError"
    assert last["runs"][0]["status"] == "diverged"


def test_what_a_problem_prints_is_not_in_the_way(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "r.yaml").write_text("problem: loud.py:Loud\nname: loud\n")
    *events, last = documents("run", "r.yaml", *SHORT, "--runs-dir", runs)
    assert events[-1]["reason"] == "done"
    assert last["runs"][0]["status"] == "done"
    broken = ("run", "r.yaml", "problem=loud.py:Broken", "--runs-dir", runs)
    *_, last = documents(*broken, code=7)
    assert last["runs"] == []  # there is nothing to go on from
    assert "no loss today" in last["error"]["message"]


def test_check():
    words = ("check", "quadratic", "upper.steps=2", "--estimators")
    rows = document(*words, "implicit")["rows"]
    assert [(row["name"], row["verdict"]) for row in rows] == [("implicit", "exact")]
    assert rows[0]["stats"]["hvps"] == 10
    refused = document(*words, "implicit,kkt", code=4)
    assert refused["command"] == "bilevel check quadratic upper.steps=2 --estimators implicit,kkt"
    assert [row["verdict"] for row in refused["rows"]] == ["exact", "refused"]
    (row,) = document("check", "quadratic", "--path", "--estimators", "unroll")["rows"]
    assert row["whole"]["cosine"] == pytest.approx(1.0)


def test_compare(tmp_path, monkeypatch):
    def in_this_process(spec):
        cell.main(spec)
        return files.read(cell.Path(spec["result"]))

    monkeypatch.setattr(launch, "run", in_this_process)
    words = ("compare", "quadratic", "upper.steps=2", "evaluate.every=0", "--runs-dir", tmp_path)
    found = document(*words, "--estimators", "none")
    assert {row["label"] for row in found["rows"]} == {"implicit", "none"}
    kept = json.loads((tmp_path / found["file"]).read_text())
    assert kept["rows"] == found["rows"]
    document(*words, "--estimators", "no_such", code=2)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["runs", "--json", "--no-such"], 2), (["ls", "--json", "a", "b"], 2), (["nothing"], 2)],
)
def test_a_command_line_that_is_not_understood_parses_too(words, code, monkeypatch, capsys):
    monkeypatch.setattr(module, "_given", [])
    monkeypatch.setattr(sys, "argv", ["bilevel", *words])
    from bilevel.cli.app import app

    with pytest.raises(SystemExit) as exit_:
        app(words)
    module.answer_usage(exit_.value.code, words)
    said = capsys.readouterr().out
    assert exit_.value.code == code
    if "--json" in words:
        assert json.loads(said)["error"]["exit_code"] == code
    else:
        assert said == ""


def test_an_unforeseen_error_parses_too():
    code = (
        "import bilevel.cli.ls as ls, sys\n"
        "def fail(*_): raise ZeroDivisionError('by chance')\n"
        "ls.list_all = fail; sys.argv = ['bilevel', 'ls', '--json']\n"
        "from bilevel.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"] == {
        "kind": "ZeroDivisionError",
        "message": "by chance",
        "exit_code": 1,
    }


def test_a_quiet_run_says_how_it_ended(runs):
    words = ("run", "quadratic", *SHORT, "--runs-dir", runs)
    loud = invoke(*words).output
    quiet = invoke(*words, "--quiet").output
    assert "upper value" in quiet
    assert "done at step 4" in quiet
    for part in ("‖dΦ/dx‖ ", "variables", "checking"):
        assert part not in quiet
    assert "variables" in loud  # negative control


def test_a_quiet_check_is_its_table(runs):
    words = ("check", "quadratic", "--estimators", "implicit")
    quiet = invoke(*words, "-q").output
    assert "exact" in quiet
    assert "claim err:" not in quiet
    assert "checking" not in quiet
    assert "claim err:" in invoke(*words).output  # negative control
    assert invoke("validate", "quadratic", "--quiet").output == ""


def test_quiet_says_errors(runs):
    folder = run(runs)
    assert "this run is done" in invoke("resume", folder, "--quiet", code=2).stderr
