"""A run whose ranks hold y together, on the command line: its checkpoints are whole, its ends those of any."""

import json
import shutil

import pytest

from bilevel.cli import member
from bilevel.runfolder import checkpoint
from tests.cli.commands import invoke
from tests.cli.over_ranks import on_command_line, recipe

IN_PARTS = ("runtime.mesh.shard=2", "estimator.preconditioner=recycled", "checkpoint.every=2")
WHOLE = IN_PARTS[1:]


@pytest.fixture
def rows(tmp_path):
    return recipe(tmp_path)


def the_run(runs):
    (folder,) = runs.glob("*/*")
    return folder


def end(folder):
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    return checkpoint.load(found.path)


def off(folder, truth):
    """Of x, y, an optimizer's moment and a solver's pairs."""
    found = end(folder)
    assert found["step"] == truth["step"]
    far = []
    for state in ("x", "y", ("upper", "square"), ("estimator", "preconditioner")):
        a, b = found, truth
        for key in (state,) if isinstance(state, str) else state:
            a, b = a[key], b[key]
        assert a.keys() == b.keys()
        far += [float((a[k] - b[k]).norm() / b[k].norm()) for k in b]
    return max(far)


def test_it_is_stopped_and_resumed_on_any_number_of_ranks(rows, runs):
    invoke("run", rows, *WHOLE, "--runs-dir", runs / "alone")
    alone = end(the_run(runs / "alone"))
    assert [*alone["y"]["y"].shape] == [3]
    found = on_command_line(2, "run", rows, *IN_PARTS, "--runs-dir", runs / "whole")
    assert [each.code for each in found] == [0, 0], found
    assert 0 < off(the_run(runs / "whole"), alone) < 1e-9  # its pairs amplify rounding
    truth = end(the_run(runs / "whole"))
    about = json.loads((the_run(runs / "whole") / "environment.json").read_text())
    assert (about["ranks"], about["mesh"]) == (2, {"data": 1, "shard": 2})
    without = json.loads((the_run(runs / "alone") / "environment.json").read_text())
    assert without["mesh"] == {"data": 1, "shard": 1}
    assert about["hash"] == without["hash"]  # it says how, not what
    acts = "1:3:SIGTERM"
    stopped = on_command_line(2, "run", rows, *IN_PARTS, "--runs-dir", runs / "2", acts=acts)
    assert [each.code for each in stopped] == [143, 143], stopped
    assert end(the_run(runs / "2"))["step"] == 3
    for name in ("4", "1"):
        shutil.copytree(runs / "2", runs / name)
    assert {each.code for each in on_command_line(2, "resume", the_run(runs / "2"))} == {0}
    assert off(the_run(runs / "2"), truth) == 0
    assert {each.code for each in on_command_line(4, "resume", the_run(runs / "4"))} == {0}
    invoke("resume", the_run(runs / "1"))  # a process without a group
    for name in ("4", "1"):
        assert off(the_run(runs / name), truth) < 1e-9


def test_a_rank_that_is_gone_leaves_the_last_checkpoint(rows, runs, monkeypatch):
    monkeypatch.setattr(member, "PATIENCE", 0.2)
    options = (*IN_PARTS, "--runs-dir", runs)
    found = on_command_line(2, "run", rows, *options, acts="1:4:SIGKILL")
    assert found[0].code == 1, found
    assert "rank 1 of 2 is gone without a word" in found[0].stderr
    assert end(the_run(runs))["step"] == 2
    assert {each.code for each in on_command_line(2, "resume", the_run(runs))} == {0}
    assert end(the_run(runs))["step"] == 6


def test_ranks_that_are_no_such_mesh_are_refused_before_a_folder_is_made(rows, runs):
    said = "runtime.mesh is {data: -1, shard: 2}, which takes a multiple of 2 ranks, and there is 1"
    found = invoke("run", rows, "runtime.mesh.shard=2", "--runs-dir", runs, code=2)
    assert said in " ".join(found.stderr.split())
    assert "runtime.mesh.shard to 1" in " ".join(found.stderr.split())
    assert not runs.exists() or not [*runs.iterdir()]
