"""`runs`: what became of them, damaged ones too."""

import importlib.util
import re
from pathlib import Path

import pytest

from bilevel.runfolder import record
from tests.cli.commands import invoke, run, unfinished


def test_runs_lists_what_became_of_them(runs):
    assert "No runs in" in invoke("runs", "--runs-dir", runs).output
    folder = run(runs)
    text = invoke("runs", "--runs-dir", runs).output
    assert re.search(rf"quadratic/{folder.name} +done +4/4 +implicit +\S+e", text)


def test_runs_say_which_estimator_and_which_y(runs):
    run(runs, "estimator=bome")
    run(runs, "estimator=betty:neumann") if importlib.util.find_spec("betty") else None
    text = " ".join(invoke("runs", "--runs-dir", runs).output.split())
    assert re.search(r"done 4/4 bome \d", text)
    assert "F at the y of the run itself" in text


def test_a_sweep_is_one_row_until_its_runs_are_asked_for(runs):
    alone, *trials = (run(runs) for _ in range(3))
    sweep = runs / "mine-sweep"
    sweep.mkdir()
    (sweep / "sweep.yaml").write_text("")
    for number, folder in enumerate(trials):
        folder.rename(sweep / f"trial-000{number}-seed0")
    listed = invoke("runs", "--runs-dir", runs).output
    assert re.search(r"^mine-sweep/ +2 done *$", listed, re.MULTILINE)
    assert f"quadratic/{alone.name}" in listed
    assert "trial-0000" not in listed
    for words in (["--all"], ["--where", "sweep=mine-sweep"], ["--sort", "upper_loss"]):
        shown = invoke("runs", *words, "--runs-dir", runs).output
        assert "mine-sweep/trial-0001-seed0" in shown
        assert (alone.name in shown) is (words[0] != "--where")
    (sweep / "trial-0001-seed0" / record.FILE).write_text("")
    listed = invoke("runs", "--runs-dir", runs).output
    assert re.search(r"^mine-sweep/ +2 runs: 1 done, 1 \w+", listed, re.MULTILINE)


def test_a_run_without_a_record_says_so(runs):
    folder = run(runs, "sinks=[]")
    assert re.search(rf"{folder.name} +unrecorded +4 ", invoke("runs", "--runs-dir", runs).output)


@pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="there is no /proc")
def test_a_folder_of_anything_else_holds_no_runs():
    assert "No runs in /proc/" in invoke("runs", "--runs-dir", "/proc").output


def test_a_file_in_the_place_of_runs_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    said = invoke("runs", "--runs-dir", tmp_path / "file", code=1).stderr
    assert said == f"error: {tmp_path}/file: cannot be read: Not a directory\n"


def test_a_damaged_record_is_one_message_and_hides_no_other_run(runs):
    whole, folder = run(runs), unfinished(runs)
    path = folder / record.FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{torn\n", *lines[3:]]))
    assert f"error: {path}:3: " in invoke("resume", folder, code=1).stderr
    text = invoke("runs", "--runs-dir", runs).output
    assert re.search(rf"{whole.name} +done", text)
    assert re.search(rf"{folder.name} +stopped", text)
    path.write_text("".join([*lines[:-1], "{torn\n"]))
    assert re.search(rf"{folder.name} +damaged", invoke("runs", "--runs-dir", runs).output)
    path.write_text("".join(lines))
    invoke("resume", folder)
