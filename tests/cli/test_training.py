"""Early stopping and the best checkpoint, as the command line has them."""

import re
import shutil
from pathlib import Path

import pytest

from bilevel.runfolder import checkpoint, record
from tests.cli.commands import invoke

PROBLEM = """
from bilevel_problems.quadratic import Quadratic

class Peaked(Quadratic):
    times = 0
    def evaluate(self, x, y):
        self.times += 1
        return {"peak": -abs(self.times - 3), "flat": 1.0}

    def export(self, x, y, folder, merged):
        folder.mkdir(exist_ok=True)
        (folder / "x.txt").write_text(str(float(sum(v.sum() for v in x.values()))))
"""
PEAK = "checkpoint.best={measure: peak, mode: max}"
STOP = "evaluate.stop={measure: flat, mode: max, patience: 5}"


@pytest.fixture
def peaked(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(PROBLEM)
    return f"problem={tmp_path / 'mine.py'}:Peaked"


def begin(runs: Path, *overrides: str):
    common = ("upper.steps=20", "evaluate.every=2", "checkpoint.every=2", "report=false")
    result = invoke("run", "quadratic", *common, *overrides, "--runs-dir", runs)
    return result, max(runs.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_run_that_stops_early(peaked: str, runs: Path, tmp_path: Path):
    result, folder = begin(runs, peaked, STOP, PEAK)
    assert "stopped early at step 10" in result.output
    said = "flat has not risen above the 1 of step 0 in 5 evaluations"
    assert said in " ".join(result.output.split())
    assert re.search(r"stopped early +10/20", invoke("runs", "--runs-dir", runs).output)
    assert record.last(folder)["message"] == said
    # the best, which is none of the newest, and those
    assert names(folder / "checkpoints") == ["step-00000008", "step-00000010"]
    assert names(folder / "checkpoints" / "best") == ["step-00000004"]

    refused = invoke("resume", folder, "--runs-dir", runs, code=2).stderr
    assert "has stopped early (10 steps)" in " ".join(refused.split())
    assert "evaluate.stop=null" in refused

    for to, best, step in (("newest", (), 10), ("best", ("--best",), 4)):
        output = invoke("export", folder, "--to", tmp_path / to, *best).output
        assert f"step {step}" in output
    newest, best = ((tmp_path / name / "x.txt").read_text() for name in ("newest", "best"))
    x = checkpoint.load(folder / "checkpoints" / "best" / "step-00000004")["x"]
    assert best == str(float(sum(v.sum() for v in x.values())))
    assert newest != best


def test_without_a_best_there_is_none_to_export(peaked: str, runs: Path, tmp_path: Path):
    _, folder = begin(runs, peaked, "upper.steps=2")
    refused = invoke("export", folder, "--to", tmp_path / "to", "--best", code=1).stderr
    assert "keeps no best checkpoint" in refused
    assert not (tmp_path / "to").exists()


def test_the_start_may_be_the_best(runs: Path):
    _, folder = begin(runs, "upper.steps=4", "checkpoint.best={measure: distance to y*, mode: max}")
    assert names(folder / "checkpoints" / "best") == ["step-00000000"]


def test_the_best_and_the_end_of_a_run_that_was_killed(runs: Path):
    """Resumed from step 4 it keeps, and ends with, what the whole run does."""
    options = (
        "evaluate.stop={measure: upper value, mode: min, patience: 2, min_delta: 25}",
        "checkpoint.best={measure: distance to y*, mode: min}",
    )
    _, folder = begin(runs, *options, "checkpoint.keep=99")
    shutil.copytree(folder, runs / "quadratic" / "whole")
    end = record.last(folder)
    assert end["reason"] == "stopped early"
    assert end["step"] > 6
    for path in (folder / "checkpoints").glob("step-*"):
        if checkpoint.step_of(path) > 4:
            shutil.rmtree(path)
    (folder / record.FILE).write_text(
        "".join((folder / record.FILE).read_text().splitlines(keepends=True)[:-1])
    )
    invoke("resume", folder, "--runs-dir", runs)
    assert record.last(folder)["message"] == end["message"]
    for where in ("checkpoints", "checkpoints/best"):
        a, b = (
            sorted(f.glob("step-*")) for f in (folder / where, runs / "quadratic/whole" / where)
        )
        assert checkpoint.step_of(a[-1]) == checkpoint.step_of(b[-1])
        tensors = [(path / checkpoint.TENSORS).read_bytes() for path in (a[-1], b[-1])]
        assert tensors[0] == tensors[1]
