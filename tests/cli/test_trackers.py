"""Trackers of a run: a missing package, and one that fails in the middle of it."""

import pytest

from bilevel.runfolder import record
from bilevel.sinks import tracking
from tests.cli.commands import RUNNER, app

SINK = """
from pathlib import Path
from bilevel.components import component
from bilevel.sinks.tracking import TrackerReceiver

class Run:
    def __init__(self, failing):
        self.failing, self.told = failing, []
    def scalars(self, step, values):
        if self.failing == step:
            raise OSError("no space left")
        self.told.append(step)
    def end(self, status):
        if self.failing == "end":
            raise OSError("no space left")
    def __getattr__(self, name):
        return lambda *given: None

@component
class Mine:
    failing: int | str = 3
    def open(self, folder, step):
        return TrackerReceiver("mine", Run(self.failing), folder, step, repeats=False)
"""


def run(tmp_path, *overrides):
    words = ["run", "quadratic", "upper.steps=5", "report=false", *overrides]
    result = RUNNER.invoke(app, [*words, "--runs-dir", str(tmp_path / "runs")])
    folders = list((tmp_path / "runs").glob("*/*/"))
    return result, list(record.read(folders[0])) if folders else []


@pytest.mark.parametrize("failing", [3, "end"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(failing, tmp_path):
    (tmp_path / "sink.py").write_text(SINK)
    mine = f"{{name: '{tmp_path}/sink.py:Mine', failing: {failing}}}"
    result, events = run(tmp_path, f"sinks=[{mine}, jsonl]")
    assert result.exit_code == 0
    assert result.output.count("mine: no space left; it is left out from here on") == 1
    assert events[-1]["event"] == "finished"
    assert [e["step"] for e in events if e["event"] == "stepped"] == [1, 2, 3, 4, 5]
    warned = [(e["kind"], e["step"]) for e in events if e["event"] == "warned"]
    assert warned == ([("mine", 3)] if failing == 3 else [])


CLOSED = """
from pathlib import Path
from bilevel.components import component
from bilevel.sinks import tracking

@component
class Mine:
    @tracking.opening("mine")
    def open(self, folder, step):
        raise ConnectionError("nobody answers\\nat all")
"""


def test_one_that_cannot_be_opened_ends_a_new_run(tmp_path):
    (tmp_path / "sink.py").write_text(CLOSED)
    result, events = run(tmp_path, f"sinks=[jsonl, '{tmp_path}/sink.py:Mine']")
    assert result.exit_code == 1
    said = "error: mine: cannot be opened: ConnectionError: nobody answers; mend it, or take it out"
    assert said in result.output
    assert "Traceback" not in result.output
    assert events == []


def test_one_that_cannot_be_opened_keeps_no_run_from_being_resumed(tmp_path):
    (tmp_path / "sink.py").write_text(SINK)
    result, _ = run(tmp_path, f"sinks=[jsonl, {{name: '{tmp_path}/sink.py:Mine', failing: 0}}]")
    assert result.exit_code == 0
    (folder,) = (tmp_path / "runs").glob("*/*/")
    path = folder / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # as if cut off
    (tmp_path / "sink.py").write_text(
        CLOSED.replace("class Mine:", "class Mine:\n    failing: int = 0")
    )
    result = RUNNER.invoke(app, ["resume", str(folder)])
    assert result.exit_code == 0, result.output
    assert "warning: mine: cannot be opened: ConnectionError: nobody answers" in result.output
    assert list(record.read(folder))[-1]["reason"] == "done"


def test_a_missing_package_ends_the_command_with_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda module: None)
    result, events = run(tmp_path, "sinks=[jsonl, tensorboard]")
    assert result.exit_code == 3
    assert "pip install 'bilevel[tensorboard]'" in result.output
    assert events == []
