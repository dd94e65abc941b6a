"""What is said of a run that ended before its last step, or before its first: measures, report, folder."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from bilevel import report
from bilevel.runfolder import record
from tests.cli.commands import SHORT, invoke
from tests.report.records import table

ENDING = """
import os, signal
from bilevel.components import component
from bilevel.events import Stepped
from bilevel_problems.quadratic import Quadratic

@component
class Signal:
    def open(self, folder, step): return self
    def receive(self, event):
        if isinstance(event, Stepped) and event.step == 3: os.kill(os.getpid(), signal.SIGINT)
    def close(self): ...

@component
class Failing(Quadratic):
    where: str
    def init(self, streams):
        if self.where == "init": raise ValueError("no start")
        return super().init(streams)
    def evaluate(self, x, y):
        if self.where == "evaluate": raise ValueError("no measure")
        return super().evaluate(x, y)
    def upper_batches(self, stream):
        for number, batch in enumerate(super().upper_batches(stream)):
            if self.where == f"step {number}": raise ValueError("no batch")
            yield batch
"""


@pytest.fixture
def ending(tmp_path: Path) -> Path:
    path = tmp_path / "ending.py"
    path.write_text(ENDING)
    return path


def interrupted(ending: Path, runs: Path, *words: str):
    """A run of six steps in which Ctrl-C comes after the third: (result, run folder)."""
    sinks = f"sinks=[jsonl, {{name: '{ending}:Signal'}}]"
    words = ("quadratic", "upper.steps=6", *words, sinks)
    result = invoke("run", *words, "--runs-dir", runs, code=130)
    (folder,) = runs.glob("*/*")
    return result, folder


@pytest.mark.parametrize(
    ("every", "at", "head", "in_list"),
    [
        (2, 2, "at step 2", "{} at step 2"),
        (0, 0, "after", "{} at step 0"),
        (3, 3, "after", "{}"),
    ],
)
def test_no_measure_is_shown_as_that_of_another_step(every, at, head, in_list, ending, runs):
    result, folder = interrupted(ending, runs, f"evaluate.every={every}", "--quiet")
    measured = [event for event in record.read(folder) if event["event"] == "evaluated"]
    assert measured[-1]["step"] == at
    first, last = (f"{measured[n]['metrics']['upper value']:.4g}" for n in (0, -1))
    after = last if at else "-"
    found = re.search(
        r"before +(.*)\nupper value +(\S+) +(\S+)\n", result.stdout.replace(" \n", "\n")
    )
    assert found is not None
    assert (found[1].strip(), found[2], found[3]) == (head, first, after)

    rows = table((folder / "report.html").read_text(), "Result")
    assert rows[""] == ["before", head, "change"]
    assert (rows["upper value"][1] == "–") is (at == 0)

    answer = json.loads(invoke("runs", "--runs-dir", runs, "--json").stdout)["runs"][0]
    assert answer["measured_at"] == at
    line = invoke("runs", "--runs-dir", runs, "--show", "upper_value").output.splitlines()[1]
    shown = re.sub(r"[\d.]+", "{}", line.split("  ")[-1].strip(), count=1)
    assert shown == in_list


def test_the_answer_says_of_which_step_the_measures_are(ending, runs):
    result, _ = interrupted(ending, runs, "evaluate.every=2", "report=false", "--json")
    (found,) = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert (found["step"], found["measured_at"]) == (3, 2)


@pytest.mark.parametrize("is_written", [False, True])
def test_a_signal_in_the_report_of_a_run_that_is_done_says_so(is_written, runs, monkeypatch):
    write = report.write

    def stopped(folder):
        if is_written:
            write(folder)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the report of a run that is done may be left")

    monkeypatch.setattr(report, "write", stopped)
    result = invoke("run", "quadratic", *SHORT[:-1], "--runs-dir", runs, code=130)
    (folder,) = runs.glob("*/*")
    said = result.stderr.strip()
    assert said == f"the run in {folder} is done. Write its report: bilevel report {folder}"
    monkeypatch.undo()
    invoke("report", folder)
    assert "is done" in invoke("resume", folder, code=2).stderr


def test_a_signal_as_the_sinks_of_a_run_that_is_done_are_closed_says_so(ending, runs):
    text = ending.read_text().replace(
        "def close(self): ...", "def close(self): os.kill(os.getpid(), signal.SIGINT)"
    )
    ending.write_text(text.replace("event.step == 3", "False"))
    sinks = f"sinks=[jsonl, {{name: '{ending}:Signal'}}]"
    result = invoke("run", "quadratic", *SHORT, sinks, "--runs-dir", runs, code=130)
    (folder,) = runs.glob("*/*")
    assert result.stderr.strip() == f"the run in {folder} is done"


@pytest.mark.parametrize(
    ("where", "is_left"),
    [("init", False), ("evaluate", False), ("step 0", False), ("step 2", True)],
)
def test_a_folder_is_named_where_there_is_one(where, is_left, ending, runs):
    problem = f"problem={{name: '{ending}:Failing', where: {where}}}"
    words = ("run", "quadratic", problem, *SHORT, "--runs-dir", runs)
    result = invoke(*words, code=7)
    assert "no " in result.stderr
    assert bool(list(runs.glob("*/*"))) is is_left
    assert (str(runs) in result.stdout) is is_left
    assert result.stdout.count(f"{runs}/quadratic") == is_left


def test_a_run_that_diverges_in_its_first_step_names_what_it_leaves(runs):
    words = ("upper.optimizer={name: sgd, lr: 1e200}", "lower.steps=2", "report=false")
    result = invoke("run", "quadratic", *words, "--runs-dir", runs, code=5)
    (folder,) = runs.glob("*/*")
    assert result.stdout.count(f"{folder}/\n") == 1


LEAVING = """
import atexit, os, signal
atexit.register(os.kill, os.getpid(), signal.SIGINT)  # the last, as torch's own that are registered first
{command}
"""
MAIN = "from bilevel.cli import main; main()"


@pytest.mark.parametrize(("command", "is_quiet"), [(MAIN, True), ("print('linear')", False)])
def test_ctrl_c_while_python_ends_shows_nothing(command, is_quiet):
    text = LEAVING.format(command=command)
    ended = subprocess.run(
        [sys.executable, "-c", text, "ls"], capture_output=True, text=True, check=False
    )
    assert "linear" in ended.stdout
    assert ("KeyboardInterrupt" not in ended.stderr) == is_quiet  # the second is the control
