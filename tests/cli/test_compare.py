"""`compare` as a user meets it: the table, failed cells, Ctrl-C and going on, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel import report
from bilevel.cli.app import app
from bilevel.comparing import cell, files, launch

RUNNER = CliRunner()
SHORT = ("upper.steps=4", "evaluate.every=0")
PROCESS = launch.run

BROKEN = """
import os
from bilevel.estimators.implicit import Implicit
class Raises:
    claim, needs = None, Implicit().needs
    def init(self, at): return {}
    def estimate(self, losses, at, state): raise ValueError("out of ideas")
class Leaves(Raises):
    def estimate(self, losses, at, state): os._exit(17)
"""


def invoke(runs: Path, *arguments: object, code: int = 0):
    words = ["compare", *arguments, "--runs-dir", runs]
    result = RUNNER.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """What was started, run in this process unless it would end it."""
    seen: list[str] = []

    def run(spec):
        name = Path(spec["result"]).stem
        seen.append(name.split("-seed")[0])
        if "Leaves" in name or "isolated" in name:
            return PROCESS(spec)
        cell.main(spec)
        return files.read(Path(spec["result"]))

    monkeypatch.setattr(launch, "run", run)
    return seen


def test_a_table_a_file_and_a_figure(tmp_path, started):
    labels = tmp_path / "labels.yaml"
    labels.write_text("cg2: {name: implicit, solver: {name: cg, iterations: 2}}\n")
    result = invoke(
        tmp_path,
        "quadratic",
        *SHORT,
        "--estimators",
        "cg2,none",
        "--labels",
        labels,
        "--seeds",
        "0,1",
    )
    assert started == ["points", "implicit", "cg2", "none"] * 2
    lines = result.output.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    table = [re.match(r"(\d)  ?(\S+) .*?(\d+/\d+/\d+)", line) for line in lines]
    shown = [m.groups() for m in table if m]
    assert shown == [("1", "implicit", "2/10/1"), ("2", "cg2*", "2/2/1"), ("3", "none", "1/0/0")]
    assert "err: ‖h − dΦ/dx‖ / ‖dΦ/dx‖" in result.output
    words = ("--estimators", "cg2,none", "--labels", labels, "--seeds", "0,1", "--quiet")
    quiet = invoke(tmp_path, "quadratic", *SHORT, *words).output  # all is measured
    assert "cg2*" in quiet
    assert "err: ‖h − dΦ/dx‖ / ‖dΦ/dx‖" not in quiet
    (folder,) = tmp_path.glob("compare-quadratic-*")
    document = json.loads((folder / "compare.json").read_text())
    assert document["rows"][0]["error"] < 1e-6
    assert document["rows"][1]["error"] > 1e-3
    assert document["environment"]["packages"]["torch"]
    assert {(c["label"], c["seed"]) for c in document["cells"]} == {
        (label, seed) for label in ("implicit", "cg2", "none") for seed in (0, 1)
    }
    assert (folder / "error-cost.svg").is_file() or "no figure" in result.stderr
    if not report.missing():
        page = folder / "compare.html"
        assert str(page) in result.output
        assert "--estimators cg2,none --labels" in page.read_text()
        again = RUNNER.invoke(app, ["report", folder.name, "--runs-dir", str(tmp_path)])
        assert again.output == f"{page}\n"


def test_a_failed_cell_is_shown_and_the_others_stand(tmp_path, started, monkeypatch):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    asked = "broken.py:Raises,broken.py:Leaves"
    result = invoke(tmp_path, "quadratic", *SHORT, "--estimators", asked, code=6)
    assert "ValueError: out of ideas" in result.output
    assert "ended with code 17" in result.output.replace("\n", " ")
    assert re.search(r"^1 +implicit ", result.output, re.MULTILINE)
    assert re.search(r"^- +broken.py:Leaves .* failed$", result.output, re.MULTILINE)
    assert result.output.count("failed") >= 2
    started.clear()
    invoke(tmp_path, "quadratic", *SHORT, "--estimators", asked, code=6)
    assert len(started) == 2  # what failed is tried again, what is done is not
    assert not {"points", "implicit"} & set(started)


def test_what_cannot_work_is_shown_and_not_started(tmp_path, started):
    result = invoke(tmp_path, "quadratic", *SHORT, "--estimators", "kkt,none", code=6)
    assert started == ["points", "implicit", "none"]
    assert re.search(r"^- +kkt .* failed$", result.output, re.MULTILINE)
    assert "have lower_constraints" in result.output.replace("\n", " ")
    started.clear()
    result = invoke(tmp_path, "quadratic", *SHORT, "--estimators", "kkt,fomaml", code=2)
    assert "lower_constraints" in result.stderr
    assert "lower_start" in result.stderr
    assert not started


def test_a_cell_in_a_process_of_its_own(tmp_path, started):
    labels = tmp_path / "labels.json"
    labels.write_text('{"isolated": {"name": "implicit", "damping": 0.1}}')
    invoke(tmp_path, "quadratic", *SHORT, "--labels", labels)
    (path,) = tmp_path.glob("compare-*/cells/isolated-*.json")
    found = files.read(path)
    assert found["status"] == "ok"
    assert found["estimate"]["memory"] < 50e6
    assert not path.with_suffix(".log").read_text()


def test_an_interrupted_comparison_goes_on(tmp_path, started, monkeypatch):
    inner, asked = launch.run, ("quadratic", *SHORT, "--estimators", "none,one_step")

    def stop(spec):
        if len(started) == 2:
            raise KeyboardInterrupt
        return inner(spec)

    monkeypatch.setattr(launch, "run", stop)
    invoke(tmp_path, *asked, code=130)
    assert started == ["points", "implicit"]
    monkeypatch.setattr(launch, "run", inner)
    assert "as before" in invoke(tmp_path, *asked).output
    assert started == ["points", "implicit", "none", "one_step"]
    invoke(tmp_path, *asked)
    assert len(started) == 4
    invoke(tmp_path, "quadratic", *SHORT, "lower.steps=3", "--estimators", "none")
    assert started[4:] == ["points", "implicit", "none"]
    assert len(list(tmp_path.glob("compare-*"))) == 2


def test_a_run_that_diverges_fails_its_cells_and_says_so(tmp_path, started):
    result = invoke(
        tmp_path, "quadratic", *SHORT, "lower.optimizer.lr=1e200", "--estimators", "none", code=6
    )
    assert started == ["points"]
    assert "the recipe's own run" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quadratc"], 2, "Did you mean 'quadratic'"),
        (["quadratic", "--estimators", "implict"], 2, "Did you mean 'implicit'"),
        (["quadratic", "--seeds", "4..0"], 2, "is empty"),
        (["quadratic", "--labels", "absent.yaml"], 2, "cannot be read"),
        (
            ["quadratic", "--with", "mine.yaml"],
            2,
            "--with is now --labels; write --labels mine.yaml",
        ),
        (["quadratic", "runtime.device=cuda:99"], 3, "cuda:99"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_anything_starts(arguments, code, message, tmp_path, started):
    assert message in invoke(tmp_path, *arguments, code=code).stderr
    assert not started
    assert not list(tmp_path.iterdir())


OWN = """
from bilevel_problems.ridge import Ridge
class Mine(Ridge):
    def lower_solution(self, x):
        return {"w": 1.1 * super().lower_solution(x)["w"]}
"""


def test_a_lower_solution_that_is_none_is_no_reference(tmp_path, started):
    (tmp_path / "own.py").write_text(OWN)
    words = ("ridge", f"problem={tmp_path}/own.py:Mine", *SHORT, "--estimators", "implicit")
    result = invoke(tmp_path, *words, code=6)
    said = "the recipe's own run: Mine.lower_solution is not a solution: ‖∇y G‖ = "
    assert said in " ".join(result.output.split())
    assert started == ["points"]
