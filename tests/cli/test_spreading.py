"""One run over ranks on the command line: its numbers, its folder, its one voice."""

import json
import shutil

import pytest
import torch

from bilevel.runfolder import checkpoint, record
from tests.cli.commands import invoke
from tests.cli.over_ranks import on_command_line, recipe


@pytest.fixture
def rows(tmp_path):
    return recipe(tmp_path)


def the_run(runs):
    (folder,) = runs.glob("*/*")
    return folder


def end(folder):
    """x, y and what the optimizers know at the newest checkpoint."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    state = checkpoint.load(found.path)
    return state["step"], {**state["x"], **state["y"]}


def whole(rows, runs, *overrides):
    invoke("run", rows, *overrides, "--runs-dir", runs)
    return end(the_run(runs))


def off(found, truth):
    assert found[0] == truth[0]
    return max(
        float((found[1][k] - truth[1][k]).norm() / truth[1][k].norm()) for k in truth[1]
    )


@pytest.mark.parametrize("size", [2, 3])
def test_the_run_is_that_of_one_rank_and_its_folder_is_one(size, rows, runs, tmp_path):
    truth = whole(rows, tmp_path / "alone")
    found = on_command_line(size, "run", rows, "--runs-dir", runs)
    assert [each.code for each in found] == [0] * size, found
    first, *others = found
    assert first.output.count("done at step 6") == 1
    assert [(each.output, each.stderr) for each in others] == [("", "")] * (size - 1)
    folder = the_run(runs)
    assert 0 < off(end(folder), truth) < 1e-12
    about = json.loads((folder / "environment.json").read_text())
    alone = json.loads((the_run(tmp_path / "alone") / "environment.json").read_text())
    assert (about["ranks"], alone["ranks"]) == (size, 1)
    assert about["hash"] == alone["hash"]
    assert about["command"][-2:] == ["--ranks", str(size)]
    steps = [event["step"] for event in record.read(folder) if event["event"] == "stepped"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resumed_on_as_many_ranks_it_is_the_same_bits_and_to_rounding_on_another(rows, runs):
    """Stopped at step 3 by a signal to the second rank alone, then resumed on 2, 3 and 1."""
    on_command_line(2, "run", rows, "--runs-dir", runs / "whole")
    truth = end(the_run(runs / "whole"))
    stopped = on_command_line(2, "run", rows, "--runs-dir", runs / "2", acts="1:3:SIGTERM")
    assert [each.code for each in stopped] == [143, 143]
    assert "bilevel resume" in stopped[0].stderr and "--ranks 2" in stopped[0].stderr
    assert end(the_run(runs / "2"))[0] == 3
    for name in ("3", "1"):
        shutil.copytree(runs / "2", runs / name)
    again = on_command_line(2, "resume", the_run(runs / "2"))
    assert [each.code for each in again] == [0, 0], again
    assert off(end(the_run(runs / "2")), truth) == 0
    on_command_line(3, "resume", the_run(runs / "3"))
    assert 0 < off(end(the_run(runs / "3")), truth) < 1e-12
    invoke("resume", the_run(runs / "1"))
    assert 0 < off(end(the_run(runs / "1")), truth) < 1e-12


def test_what_one_rank_began_several_go_on_with(rows, runs):
    truth = whole(rows, runs / "whole")
    on_command_line(1, "run", rows, "--runs-dir", runs / "part", acts="0:3:SIGINT")
    folder = the_run(runs / "part")
    assert end(folder)[0] == 3
    assert {each.code for each in on_command_line(2, "resume", folder)} == {0}
    assert 0 < off(end(folder), truth) < 1e-12
    assert torch.isfinite(end(folder)[1]["x"]).all()


FIRST, OTHER = "0", "1"


@pytest.mark.parametrize(
    ("acts", "code", "said", "step"),
    [
        # somebody's own code, on either rank: its own words, from the first rank alone
        (f"{FIRST}:3:raise", 7, "KeyError: 'mine'", 2),
        (f"{OTHER}:3:raise", 7, "rank 1: batches failed in step 3: KeyError: 'mine'", 2),
        (f"{OTHER}:3:memory", 7, "rank 1: batches failed in step 3: too little memory", 2),
        (f"{OTHER}:1:raise", 7, "rank 1: batches failed in step 1: KeyError: 'mine'", None),
        (f"{OTHER}:init:raise", 7, "rank 1: Rows.init failed: KeyError: 'mine'", None),
        (f"{FIRST}:init:raise", 7, "Rows.init failed: KeyError: 'mine'", None),
        (f"{FIRST}:evaluate:raise", 7, "Rows.evaluate failed in step 1: KeyError: 'mine'", None),
        # a loss that is not finite is so on all
        ("*:3:nan", 5, "step 3: ", 2),
        (f"{OTHER}:3:nan", 5, "step 3: ", 2),
        # gone without a word
        (f"{OTHER}:3:SIGKILL", 1, "rank 1 of 2 is gone without a word: killed", 2),
        (f"{OTHER}:3:exit", 1, "rank 1 of 2 is gone without a word: killed", 2),
        (f"{OTHER}:1:SIGKILL", 1, "rank 1 of 2 is gone without a word: killed", 0),
    ],
)
def test_a_rank_that_ends_is_told_once_and_the_run_resumes(acts, code, said, step, rows, runs):
    truth = whole(rows, runs / "whole")
    found = on_command_line(2, "run", rows, "--runs-dir", runs / "part", acts=acts)
    first, other = found
    assert first.code == code, found
    assert said in first.stderr, found
    assert first.stderr.count("error: ") == 1 and "Traceback" not in first.stderr, found
    assert (other.output, other.stderr) == ("", "")
    assert other.code in (code, -9, 9)
    folders = [*(runs / "part").glob("*/*")]
    assert bool(folders) is (step is not None)
    if folders:
        assert f"bilevel resume {folders[0]} --ranks 2" in first.stderr or not step
        if step:
            assert end(folders[0])[0] == step
        again = on_command_line(2, "resume", folders[0])
        assert [each.code for each in again] == [0, 0], again
        assert 0 < off(end(folders[0]), truth) < 1e-12
