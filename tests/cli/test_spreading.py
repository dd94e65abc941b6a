"""One run over ranks on the command line: its numbers, its folder, its one voice."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from bilevel.cli import member, spreading
from bilevel.cli.signals import MARK, Signals
from bilevel.runfolder import RunFolder, checkpoint, record
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


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Where one rank ends."""
    folder = tmp_path_factory.mktemp("whole")
    invoke("run", recipe(folder), "--runs-dir", folder / "runs")
    run = the_run(folder / "runs")
    return end(run), json.loads((run / "environment.json").read_text())


def off(found, truth):
    assert found[0] == truth[0]
    return max(float((found[1][k] - truth[1][k]).norm() / truth[1][k].norm()) for k in truth[1])


@pytest.mark.parametrize("size", [2, 3])
def test_the_run_is_that_of_one_rank_and_its_folder_is_one(size, rows, runs, truth):
    found = on_command_line(size, "run", rows, "--runs-dir", runs)
    assert [each.code for each in found] == [0] * size, found
    first, *others = found
    assert first.output.count("done at step 6") == 1
    assert [(each.output, each.stderr) for each in others] == [("", "")] * (size - 1)
    folder = the_run(runs)
    assert 0 < off(end(folder), truth[0]) < 1e-12
    about, alone = json.loads((folder / "environment.json").read_text()), truth[1]
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
    assert f"bilevel resume {the_run(runs / '2')} --ranks 2" in stopped[0].stderr
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


def test_a_signal_that_comes_twice_under_torchrun_is_one(rows, runs):
    """A scheduler signals every process of a job, and torchrun passes on what it receives."""
    acts = "0:3:SIGTERM 0:3:SIGINT 1:3:SIGTERM 1:4:SIGTERM"
    stopped = on_command_line(2, "run", rows, "--runs-dir", runs, acts=acts)
    assert [each.code for each in stopped] == [143, 143], stopped
    assert "stopped at once" not in stopped[0].stderr
    assert end(the_run(runs))[0] == 3
    # control: what `--ranks` passes on is what was sent, and the second ends at once
    ours = {"BILEVEL_LAUNCH": str(runs)}
    acts = "0:5:SIGTERM 0:5:SIGINT"
    at_once = on_command_line(2, "run", rows, "--runs-dir", runs / "2", acts=acts, environment=ours)
    assert "stopped at once" in at_once[0].stderr
    assert end(the_run(runs / "2"))[0] == 4


def test_what_one_rank_began_several_go_on_with(rows, runs, truth):
    on_command_line(1, "run", rows, "--runs-dir", runs, acts="0:3:SIGINT")
    folder = the_run(runs)
    assert end(folder)[0] == 3
    assert {each.code for each in on_command_line(2, "resume", folder)} == {0}
    assert 0 < off(end(folder), truth[0]) < 1e-12


FIRST, OTHER = "0", "1"


@pytest.mark.parametrize(
    ("acts", "code", "said", "step"),
    [
        # somebody's own code, on either rank: its own words, by the first rank alone
        (f"{FIRST}:3:raise", 7, "error: Rows.batches failed in step 3: KeyError: 'mine'", 2),
        (f"{OTHER}:3:raise", 7, "rank 1: Rows.batches failed in step 3: KeyError: 'mine'", 2),
        (f"{OTHER}:3:memory", 7, "rank 1: Rows.batches failed in step 3: too little memory", 2),
        (f"{OTHER}:init:SIGINT", 130, "stopped before the first step: no run", None),
        (f"{OTHER}:init:raise", 7, "rank 1: Rows.init failed: KeyError: 'mine'", None),
        (f"{FIRST}:evaluate1:raise", 7, "Rows.evaluate failed in step 1: KeyError: 'mine'", None),
        # a loss that is not finite is so on all
        (f"{OTHER}:3:nan", 5, "error: step 3: upper_loss = nan", 2),
        # gone without a word
        (f"{OTHER}:3:SIGKILL", 1, "rank 1 of 2 is gone without a word: killed", 2),
        (f"{OTHER}:1:SIGKILL", 1, "rank 1 of 2 is gone without a word: killed", 0),
    ],
)
def test_a_rank_that_ends_is_told_once_and_the_run_resumes(
    acts, code, said, step, rows, runs, truth, monkeypatch
):
    monkeypatch.setattr(member, "PATIENCE", 0.2)
    found = on_command_line(2, "run", rows, "--runs-dir", runs, acts=acts)
    first, other = found
    assert first.code == code, found
    assert said in first.stderr, found
    assert first.stderr.count("error: ") == (code != 130), found
    assert "Traceback" not in first.stderr, found
    assert (other.output, other.stderr) == ("", "")
    assert other.code in (code, -9, 9)  # or killed, as it was told to be
    folders = [*runs.glob("*/*")]
    assert bool(folders) is (step is not None)
    if step:
        assert code == 5 or f"bilevel resume {folders[0]} --ranks 2" in first.stderr
        assert end(folders[0])[0] == step
    if code == 1 and folders:
        again = on_command_line(2, "resume", folders[0])
        assert [each.code for each in again] == [0, 0], again
        assert 0 < off(end(folders[0]), truth[0]) < 1e-12


def test_where_the_first_rank_is_killed_the_others_end_and_the_run_resumes(rows, runs, truth):
    found = on_command_line(2, "run", rows, "--runs-dir", runs, acts=f"{FIRST}:6:SIGKILL")
    assert [each.code for each in found] == [-9, 1], found
    assert (found[1].output, found[1].stderr) == ("", "")  # the launcher says it
    assert end(the_run(runs))[0] == 4
    again = on_command_line(2, "resume", the_run(runs))
    assert [each.code for each in again] == [0, 0], again
    assert 0 < off(end(the_run(runs)), truth[0]) < 1e-12


@pytest.mark.parametrize("seed", range(2))
def test_a_rank_killed_at_a_random_instant_leaves_a_run_that_resumes(seed, rows, runs, truth):
    """Of a run that waits for nothing but its ranks; none of them outlives another."""
    chance = random.Random(seed)
    victim, moment = chance.randrange(2), chance.uniform(0.0, 0.5)

    def kill(pids):
        while seed and not [*runs.glob("*/*/events.jsonl")]:  # the first may be killed before that
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(pids[victim], signal.SIGKILL)

    found = on_command_line(
        2,
        "run",
        rows,
        "upper.steps=100000",
        "checkpoint.every=3",
        "--runs-dir",
        runs,
        meanwhile=kill,
    )
    assert found[victim].code == -9, found
    assert found[1 - victim].code in (1, 143, -15), found  # before it hears signals, or after
    said = found[0].stderr
    assert not said or said.count("error: ") + said.count("stopped before") == 1, found
    for folder in runs.glob("*/*"):
        before = checkpoint.latest(folder / "checkpoints")
        step = (
            before.step if before else 0
        ) + 2  # what was drawn before is drawn again, unsignalled
        again = on_command_line(2, "resume", folder, acts=f"1:{step}:SIGINT")
        assert [each.code for each in again] == [130, 130], again
        assert end(folder)[0] == step


@pytest.mark.parametrize(
    ("acts", "code", "step"),
    [
        (f"{FIRST}:3:SIGHUP", 129, 3),  # to one rank
        ("*:3:SIGINT", 130, 3),  # to the process group, as a terminal does
        (f"{FIRST}:3:SIGINT {OTHER}:3:SIGTERM", 143, 3),
        (f"{OTHER}:6:SIGINT", 0, 6),  # in the last step: there is nothing left to stop
        ("*:6:twice", 130, 4),  # at once: what the last checkpoint has
        (f"{OTHER}:prepare:SIGTERM", 143, None),
    ],
)
def test_a_signal_ends_all_ranks_after_the_same_step(acts, code, step, rows, runs, tmp_path):
    launched = {MARK: str(tmp_path)}  # by --ranks: under torchrun two signals are one
    found = on_command_line(2, "run", rows, "--runs-dir", runs, acts=acts, environment=launched)
    assert [each.code for each in found] == [code, code], found
    assert (found[1].output, found[1].stderr) == ("", "")
    assert "Traceback" not in found[0].stderr
    if step is None:
        assert not [*runs.glob("*/*")]
        return
    folder = the_run(runs)
    assert end(folder)[0] == step
    assert found[0].stderr.count("Go on") == bool(code), found
    if step == 3:
        assert [*record.read(folder)][-1]["step"] == 3
        assert f"Go on (from step-00000003): bilevel resume {folder} --ranks 2" in found[0].stderr


def test_a_signal_while_x_is_held_leaves_that_measure_out(rows, runs):
    options = ["evaluate={held: true}", "upper.steps=2"]
    found = on_command_line(
        2, "run", rows, *options, "--runs-dir", runs, acts=f"{FIRST}:evaluate2:SIGINT"
    )
    assert [each.code for each in found] == [0, 0], found
    assert "interrupted: not measured" in found[0].output
    assert [*record.read(the_run(runs))][-1]["reason"] == "done"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["runtime.device=cuda:1"], 2, "is one device, and there are 2 ranks"),
        (["seeds=0..2"], 2, "2 ranks compute one run, and this recipe has seeds"),
        (["--runs-dir", "/dev/null/runs"], 1, "no run folder can be made"),
        (
            ["problem=FOLDER/rows.py:Narrow"],
            2,
            "the batch has 1 row, and 2 ranks are to have a part",
        ),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_what_is_wrong_before_the_first_step_is_said_once(options, code, said, rows, runs):
    options = [option.replace("FOLDER", str(rows.parent)) for option in options]
    found = on_command_line(2, "run", rows, "--runs-dir", runs, *options)
    assert [each.code for each in found] == [code, code], found
    assert said in found[0].stderr, found
    assert found[0].stderr.count("error") == 1
    assert (found[1].output, found[1].stderr) == ("", "")
    assert not [*runs.glob("*/*")]


def test_what_only_another_rank_lacks_is_said_by_the_first(rows, runs):
    """As a file that is on one machine and not on the other."""
    text = (rows.parent / "rows.py").read_text()
    lacking = "if os.environ['RANK'] == '1': import no_such_module\n"
    (rows.parent / "rows.py").write_text(text + lacking)
    found = on_command_line(2, "run", rows, "--runs-dir", runs)
    assert found[0].code == found[1].code > 0
    assert found[0].stderr.startswith("error: rank 1: ")
    assert "no_such_module" in found[0].stderr
    assert not [*runs.glob("*/*")]


def test_a_run_that_somebody_is_at_is_not_resumed(rows, runs):
    on_command_line(2, "run", rows, "--runs-dir", runs, acts=f"{OTHER}:3:SIGTERM")
    folder = the_run(runs)
    with RunFolder(folder).lock():
        found = on_command_line(2, "resume", folder)
    assert [each.code for each in found] == [1, 1]
    assert "another process is at this run" in found[0].stderr
    assert found[1].stderr == ""
    assert {each.code for each in on_command_line(2, "resume", folder)} == {0}
    done = on_command_line(2, "resume", folder)
    assert [each.code for each in done] == [2, 2]
    assert "this run is done" in done[0].stderr


def test_who_begins_late_still_ends_with_the_code_of_the_first(rows, runs, monkeypatch):
    """The first rank waits with its end, at which a launcher ends the others, until they hear of it."""
    late = lambda rank: time.sleep(0.5 * rank)  # noqa: E731
    monkeypatch.setattr(spreading, "register", late)
    found = on_command_line(2, "resume", runs / "none")
    assert [each.code for each in found] == [2, 2], found
    assert "error: " in found[0].stderr
    # control: one that does not wait
    monkeypatch.setattr(member, "FAREWELL", 0.0)
    assert [each.code for each in on_command_line(2, "resume", runs / "none")] == [2, -15]


def test_machines_read_the_first_rank_alone(rows, runs):
    found = on_command_line(2, "run", rows, "--json", "--runs-dir", runs)
    lines = [json.loads(line) for line in found[0].output.splitlines()]
    assert [line["step"] for line in lines if line["event"] == "stepped"] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["error"] is None
    assert found[1].output == ""
    dry = on_command_line(2, "run", rows, "--dry-run", "--runs-dir", runs)
    assert "nothing was run" in dry[0].output
    assert len([*runs.glob("*/*")]) == 1
    failed = on_command_line(
        2, "run", rows, "--json", "--runs-dir", runs, acts=f"{OTHER}:init:raise"
    )
    told = json.loads(failed[0].output.splitlines()[-1])["error"]
    assert told["exit_code"] == 7
    assert told["message"].startswith("rank 1: Rows.init failed")


def test_how_long_ranks_wait_is_a_setting_of_how_and_not_of_what(rows, runs, truth):
    options = ["runtime.timeout=1", "--runs-dir", runs]
    found = on_command_line(2, "run", rows, *options, acts=f"{OTHER}:3:sleep")
    assert found[0].code == 1
    assert "rank 1 of 2 does not come to a sum: it hangs, or its work" in found[0].stderr
    folder = the_run(runs)
    assert json.loads((folder / "environment.json").read_text())["hash"] == truth[1]["hash"]
    # control: as long as nobody sleeps that is time enough
    assert {each.code for each in on_command_line(2, "resume", folder)} == {0}


def test_none_of_it_is_there_for_nothing(rows, runs, monkeypatch):
    """Controls: without last words the cause is not known; a signal that is not shared ends one rank alone."""
    monkeypatch.setattr(member, "PATIENCE", 0.2)
    with monkeypatch.context() as without:
        without.setattr(member, "leave_word", lambda notices, error: None)
        found = on_command_line(2, "run", rows, "--runs-dir", runs / "1", acts=f"{OTHER}:3:raise")
        assert found[0].code == 1
        assert "rank 1 of 2 is gone without a word" in found[0].stderr
    monkeypatch.setattr(Signals, "agree", lambda self, ranks: bool(self.received))
    found = on_command_line(2, "run", rows, "--runs-dir", runs / "2", acts=f"{OTHER}:3:SIGINT")
    assert found[0].code != 130 or "rank 1: " in found[0].stderr
