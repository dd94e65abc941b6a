"""`run`: what it writes, and what a full disk or an early end leaves."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel import recipe as recipes
from bilevel import report, runfolder
from bilevel.cli.ensemble import measures
from bilevel.cli.names import shipped
from bilevel.errors import CheckpointError
from bilevel.runfolder import checkpoint, record
from tests.cli.commands import SHORT, invoke, run


@pytest.mark.parametrize("name", ["hyper_cleaning", "quadratic", "ridge", "sinusoid"])
def test_shipped_recipes_run_for_two_steps_without_a_warning(name, runs):
    folder = run(runs, "upper.steps=2", recipe=name)
    kinds = [event["event"] for event in record.read(folder)]
    end = ["evaluated", "held", "finished"]
    assert kinds == ["started", "evaluated", "stepped", "stepped", *end]


def test_what_was_not_measured_before_is_not_shown_as_before(runs):
    """The first measures of such a run are those of its second step."""
    words = ("quadratic", *SHORT, "evaluate.held=false", "--runs-dir", runs)
    less = invoke("run", *words, "evaluate.before=false")
    assert re.search(r"upper value +- +\d", less.output)
    assert re.search(r"upper value +[\d.]+ +\d", invoke("run", *words).output)
    by_steps = {}
    for folder in map(runfolder.RunFolder, runs.glob("*/*")):
        events = [e for e in record.read(folder.path) if e["event"] == "evaluated"]
        by_steps[tuple(e["step"] for e in events)] = measures(folder)["upper value"]
        text = report.write(folder).read_text()
        cells = re.search(r"<t[hd][^>]*>upper value</t[hd]><td>(.*?)</td>", text)
        assert cells is not None
        assert (cells[1] == "–") == (events[0]["step"] == 2)
    assert by_steps.keys() == {(0, 2, 4), (2, 4)}
    assert by_steps[2, 4] == {"after": by_steps[0, 2, 4]["after"]}


def test_a_dry_run_writes_nothing(runs):
    text = invoke("run", "quadratic", "seed=9", "--dry-run", "--runs-dir", runs).output
    assert recipes.loads(text).seed == 9
    assert "nothing was run" in text
    assert not runs.exists()


def test_a_run_leaves_its_folder(runs):
    folder = run(runs, "seed=2")
    names = {path.name for path in folder.iterdir()}
    expected = {"recipe.yaml", "resolved.yaml", "environment.json", "events.jsonl", "checkpoints"}
    assert expected <= names
    assert (folder / "recipe.yaml").read_bytes() == shipped()["quadratic"].read_bytes()
    recipe = recipes.load(folder / "resolved.yaml")
    assert recipe == recipes.load(shipped()["quadratic"], [*SHORT, "seed=2"])
    about = json.loads((folder / "environment.json").read_text())
    assert about["hash"] == recipe.hash
    assert about["overrides"] == [*SHORT, "seed=2"]
    assert folder.name.endswith(recipe.hash[:6])
    assert about["packages"]["torch"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "evaluated"] == [0, 2, 4]
    assert [e["step"] for e in events if e["event"] == "stepped"] == [1, 2, 3, 4]
    assert events[-1] | {"seconds": 0} == {
        "event": "finished",
        "step": 4,
        "reason": "done",
        "warned": {},
        "seconds": 0,
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_two_runs_at_once_have_two_folders(runs):
    assert run(runs) != run(runs)


def test_a_folder_that_cannot_be_made_is_said_before_anything_slow(tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = invoke("run", "quadratic", *SHORT, "--runs-dir", tmp_path / "file", code=1)
    assert "no run folder can be made" in result.stderr


def test_a_warning_is_counted_in_the_console_the_record_and_the_report(runs):
    words = (*SHORT, "report=true", "estimator.solver={name: neumann, iterations: 2}")
    result = invoke("run", "quadratic", *words, "--runs-dir", runs)
    assert "warned: residual at 4 of 4 steps" in result.output
    (folder,) = runs.glob("*/*")
    assert (record.last(folder, "finished") or {})["warned"] == {"residual": 4}
    if not report.missing():
        assert "At 4 of 4 steps." in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "is_written"),
    [(["report=true"], True), (["report=false"], False), (["report=true", "--no-report"], False)],
)
def test_a_report_is_left_out_by_field_or_option(words, is_written, runs, monkeypatch):
    written = []
    monkeypatch.setattr("bilevel.report.missing", list)
    monkeypatch.setattr("bilevel.report.write", lambda folder: written.append(folder) or "")
    folder = run(runs, *words)
    assert written == [runfolder.RunFolder(folder)] * is_written
    assert (
        runfolder.RunFolder(folder).environment()["hash"]
        == recipes.load(shipped()["quadratic"], SHORT).hash
    )


def test_a_full_disk_stops_the_run_and_it_can_be_resumed(runs, monkeypatch):
    write = checkpoint._write

    def fill(folder: Path, structure: object, tensors: Any, step: int, *more: Any) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, structure, tensors, step, *more)

    monkeypatch.setattr(checkpoint, "_write", fill)
    result = invoke("run", "quadratic", *SHORT, "--runs-dir", runs, code=1)
    assert "No space left on device" in result.stderr
    (folder,) = runs.glob("*/*")
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert re.search(r"failed +4/4", invoke("runs", "--runs-dir", runs).output)
    monkeypatch.undo()
    invoke("resume", folder)
    kinds = [event["event"] for event in record.read(folder)]
    assert kinds.count("stepped") == 4
    assert kinds[-1] == "finished"


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from bilevel.cli import main
main()
"""


@pytest.mark.parametrize(("limit", "remedy"), [(4096, "make room"), (16, "--runs-dir")])
def test_a_file_that_cannot_grow_is_one_message(limit, remedy, runs):
    """4096 bytes hold the recipe and some twelve events, 16 nothing."""
    words = ["upper.steps=30", "checkpoint.every=10", "report=false"]
    command = ["run", "quadratic", *words, "--runs-dir", str(runs)]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "File too large" in result.stderr
    assert remedy in result.stderr
    assert len(result.stderr.splitlines()) == 1
    folders = list(runs.glob("*/*"))
    assert len(folders) == (limit > 16)
    for folder in folders:
        assert list(record.read(folder))
        invoke("resume", folder)
        steps = [e["step"] for e in record.read(folder) if e["event"] == "stepped"]
        assert steps == list(range(1, 31))


def create(runs, recipe, environment):
    """A run folder of a recipe, with nothing run in it."""
    return runfolder.create(
        runs,
        recipe.name,
        recipe.hash,
        text="text",
        resolved=recipe.dump(),
        overrides=[],
        environment=environment,
    )


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_folder_is_made_whole_or_not_at_all(failing, runs, monkeypatch):
    write, calls = Path.write_text, []

    def fill(path: Path, *arguments: Any, **options: Any) -> int:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments, **options)

    recipe = recipes.load(shipped()["quadratic"])
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(CheckpointError, match=r"no run folder can be made: No space left"):
        create(runs, recipe, {})
    assert len(calls) == failing
    assert not list(runs.glob("*/*"))
    assert create(runs, recipe, {}).resolved.is_file()


def test_a_folder_killed_while_it_was_made_hides_no_run(runs, monkeypatch):
    """Killed before the last file: what lies there is not a run, and an older run is still found."""
    folder = run(runs)
    recipe = recipes.load(folder / "resolved.yaml")
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, to: to if to.name == "resolved.yaml" else replace(path, to)
    )
    killed = create(runs, recipe, {"time": "now"})
    monkeypatch.undo()
    assert killed.environment()["time"] == "now"
    assert runfolder.find("quadratic", runs).path == folder
    newer = create(runs, recipe, {})  # negative control
    assert runfolder.find("quadratic", runs).path == newer.path
