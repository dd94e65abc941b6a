"""`--ranks N`: what the process that starts them does with ranks that end, and with signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from bilevel.cli import launch
from bilevel.cli.app import app
from bilevel.runfolder import checkpoint, record
from tests.cli.commands import RUNNER
from tests.cli.over_ranks import recipe

RANK = """
import os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[1])
heard = []
def note(number, frame):
    heard.append(number)
    (folder / f"heard-{rank}").write_text(" ".join(map(str, map(int, heard))))
    if len(heard) > 1 or number == signal.SIGTERM and "gentle" not in sys.argv: sys.exit(128 + heard[-1])
if "deaf" not in sys.argv:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, note)
if "unregistered" not in sys.argv:
    Path(os.environ["BILEVEL_LAUNCH"], rank).write_text(str(os.getpid()))
(folder / f"is-{rank}").write_text(os.environ["OMP_NUM_THREADS"])
(folder / f"level-{rank}").write_text(os.environ.get("TORCH_CPP_LOG_LEVEL", ""))
for what in [each[2:] for each in sys.argv[2:] if each.startswith(rank + ":")]:
    if what.isdigit(): sys.exit(int(what))
    if what.startswith("SIG"): os.kill(os.getpid(), getattr(signal, what))
until = time.monotonic() + 20
while time.monotonic() < until and (not heard or "stubborn" in sys.argv): time.sleep(0.02)
sys.exit(128 + heard[-1] if heard else 0)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start two ranks of a few lines without torch; signals are sent to this process once they run."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(launch, "LAST", 1)

    def start(*what, signals=()):
        monkeypatch.setattr(launch, "_command", lambda words: [str(script), str(tmp_path), *what])

        def send():
            until = time.monotonic() + 20
            while signals and len([*tmp_path.glob("is-*")]) < 2 and time.monotonic() < until:
                time.sleep(0.02)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.3)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return launch.launch(2, [])
        finally:
            sender.join()

    return start


def heard(folder):
    return {path.name[-1]: path.read_text() for path in folder.glob("heard-*")}


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (["0:0", "1:0"], 0, ""),
        (["1:5"], 5, ""),
        (["0:5", "1:5"], 5, ""),
        (["0:SIGKILL", "1:1"], 137, "rank 0 of 2 was killed by SIGKILL, as the system does where"),
        (
            ["1:SIGKILL", "deaf"],
            137,
            "rank 1 of 2 was killed by SIGKILL",
        ),  # and rank 0 said nothing
        (["1:3", "deaf"], 3, "rank 1 of 2 ended with exit code 3."),
    ],
)
def test_it_ends_with_the_code_of_its_ranks(what, code, said, start):
    before = signal.getsignal(signal.SIGTERM), os.environ.get("BILEVEL_LAUNCH")
    got, message = start(*what)
    assert got == code
    assert message.startswith(said)
    assert bool(message) is bool(said)
    assert (signal.getsignal(signal.SIGTERM), os.environ.get("BILEVEL_LAUNCH")) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_ranks_have_their_time(number, start, tmp_path):
    assert start("gentle", signals=[number]) == (128 + number, "")
    # once one of them has ended the agent ends the other, if it has not by then
    alone, ended = str(int(number)), f"{int(number)} 15"
    assert sorted(heard(tmp_path)) == ["0", "1"]
    assert {*heard(tmp_path).values()} - {ended} == {alone}


def test_the_second_signal_is_passed_on_too_and_ends_what_does_not_end(start, tmp_path):
    assert start("stubborn", signals=[signal.SIGINT, signal.SIGINT]) == (130, "")
    assert heard(tmp_path) == {"0": "2 2", "1": "2 2"}


def test_before_all_ranks_hear_signals_the_first_ends_them(start, tmp_path):
    assert start("unregistered", signals=[signal.SIGINT]) == (130, "")
    assert {*heard(tmp_path).values()} <= {"15"}


class Dying:
    """Signals this process while it is finalized, where what a handler raises goes nowhere."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_a_signal_that_comes_while_an_object_is_finalized_is_not_lost(tmp_path, monkeypatch):
    def let_die():
        Dying()
        for _ in range(20):
            time.sleep(0.01)

    with launch.Relay(tmp_path, 2) as relay, pytest.raises(SignalException):
        let_die()
    assert relay.received == signal.SIGINT
    monkeypatch.setattr(launch.Relay, "_note_lost", lambda self, what: None)  # control
    with launch.Relay(tmp_path, 2):
        let_die()


def failures(**codes):
    """As the agent tells them: `at0_rank1=-9` was seen at second 0."""
    found = {}
    for name, code in codes.items():
        second, rank = name.removeprefix("at").split("_rank")
        found[int(rank)] = SimpleNamespace(exitcode=code, timestamp=int(second))
    return found


@pytest.mark.parametrize(
    ("found", "code", "is_said"),
    [
        (failures(at0_rank0=5, at0_rank1=5), 5, False),
        (failures(at0_rank0=1, at0_rank1=-9), 137, False),  # that lost it was seen first
        (failures(at0_rank0=1, at30_rank1=-9), 1, False),  # and this one the agent has killed
        (failures(at0_rank0=1, at0_rank1=-15), 1, False),
        (failures(at0_rank1=-11, at0_rank0=-15), 139, True),
        (failures(at0_rank1=7, at0_rank0=7), 7, False),
    ],
)
def test_the_verdict_is_that_on_the_rank_that_ended_the_others(found, code, is_said):
    got, said = launch.verdict(2, found)
    assert (got, bool(said)) == (code, is_said)


def test_each_rank_has_its_share_of_the_cores(start, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "_cores", lambda: 6)
    start("0:0", "1:0")
    assert [path.read_text() for path in tmp_path.glob("is-*")] == ["3", "3"]
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # what is set stays
    start("0:0", "1:0")
    assert [path.read_text() for path in tmp_path.glob("is-*")] == ["5", "5"]


def test_what_torch_warns_of_in_cpp_is_for_debugging(start, tmp_path, monkeypatch):
    """As of connections to a process that was killed: forty lines a rank, and twice."""
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    for is_wanted, level in ((False, "ERROR"), (True, "")):
        monkeypatch.setattr(launch.settings, "debug", is_wanted)
        start("0:0", "1:0")
        assert [path.read_text() for path in tmp_path.glob("level-*")] == [level, level]
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ


def test_a_rank_is_the_same_command_line(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/lib"])
    words = ["--debug", "run", "r.yaml", "--ranks", "2", "seed=1", "--ranks=3", "--json"]
    left = ["-m", "bilevel", "--debug", "run", "r.yaml", "seed=1", "--json"]
    assert launch._command(words) == ["-P", *left]
    monkeypatch.setattr(sys, "path", ["", "/lib"])  # as under python -m
    assert launch._command(words) == left


def test_the_words_of_the_command_line_arrive(monkeypatch, rows_recipe):
    found = []
    monkeypatch.setattr(
        launch, "launch", lambda size, words: found.append((size, words)) or (5, "")
    )
    words = ["run", str(rows_recipe), "upper.steps=2", "--ranks", "2", "--quiet"]
    assert RUNNER.invoke(app, words).exit_code == 5
    assert found == [(2, words)]


@pytest.fixture
def rows_recipe(tmp_path):
    return recipe(tmp_path)


# whole processes, which take seconds


def wait_for(condition, process):
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_from_the_start_to_a_signal_and_to_the_end_under_torchrun(tmp_path, rows_recipe):
    """One folder, one voice, the same step on both ranks, and no process that is left."""
    runs = tmp_path / "runs"
    python = [sys.executable, "-m"]
    options = ["upper.steps=100", "upper.optimizer.lr=1e-3", "--ranks", "2", "--runs-dir", runs]
    command = ["bilevel", "run", rows_recipe, *options]
    process = subprocess.Popen(
        [*map(str, [*python, *command])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: [*runs.glob("*/*/checkpoints/step-*")], process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert output.count("‖dΦ/dx‖") == 1
    (folder,) = runs.glob("*/*")
    assert f"bilevel resume {folder} --ranks 2" in said
    assert said.count("Go on") == 1
    last, found = [*record.read(folder)][-1], checkpoint.latest(folder / "checkpoints")
    assert last["reason"] == "interrupted"
    assert found is not None
    assert found.step == last["step"] < 100

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    again = subprocess.run(
        [*map(str, [*python, *torchrun, "bilevel", "resume", folder])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done at step 100") == 1
    assert [*runs.glob("*/*")] == [folder]
    steps = [event["step"] for event in record.read(folder) if event["event"] == "stepped"]
    assert steps == [*range(1, 101)]
