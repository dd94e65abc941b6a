"""Killed, or out of room, at any operation on files: resumed, the run is as if never stopped.

A run is forked, and ends at the n-th time that it opens a file for writing, renames or removes something
below the run's folder (Python's own audit events), or is about to hand an event to its sinks: no handler of
it runs, as under kill -9.
"""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bilevel.cli.app import app
from bilevel.cli.run_loop import RunLoop
from bilevel.events import Event
from tests.cli.commands import RUNNER, invoke
from tests.cli.ends import assert_same_end

OVERRIDES = ("upper.steps=12", "evaluate.every=4", "checkpoint.every=3", "report=false")
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
KILLED = 137
FEW = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def forked(words: list[str], below: Path, number: int, *, room: bool) -> tuple[int, int]:
    """(exit code, operations) of a command that is killed at operation `number` below a folder.

    With `room` False it goes on, but from there on there is no room for a file to be opened or renamed.
    """
    told, telling = os.pipe()
    process = os.fork()
    if process == 0:
        count, inside, deliver = 0, f"{below}{os.sep}", RunLoop._deliver

        def reach(may_fail: bool) -> None:
            nonlocal count
            count += 1
            if count >= number:
                if room:
                    os.write(telling, count.to_bytes(4, "big"))
                    os._exit(KILLED)
                if may_fail:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def hook(event: str, arguments: tuple) -> None:
            if event not in OPERATIONS or not str(arguments[0]).startswith(inside):
                return
            if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                reach(event in ("open", "os.mkdir"))

        def delivering(loop: RunLoop, event: Event) -> None:
            reach(False)
            deliver(loop, event)

        code = -1
        try:
            RunLoop._deliver = delivering
            sys.addaudithook(hook)
            code = RUNNER.invoke(app, words).exit_code
            os.write(telling, count.to_bytes(4, "big"))
        finally:
            os._exit(code)
    os.close(telling)
    with os.fdopen(told, "rb") as pipe:
        count = int.from_bytes(pipe.read(4), "big")
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), count


def words(runs: Path) -> list[str]:
    return ["run", "quadratic", *OVERRIDES, "--runs-dir", str(runs)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped, and how many operations on files it makes."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    code, count = forked(words(runs), runs, 10**9, room=True)
    assert code == 0
    assert count > 60
    (folder,) = runs.glob("*/*")
    return folder, count


def resumed(runs: Path) -> Path | None:
    """The run folder, its run taken to the end; None where it was not made yet."""
    found = [folder for folder in runs.glob("*/*") if (folder / "resolved.yaml").is_file()]
    if not found:
        return None
    (folder,) = found
    result = RUNNER.invoke(app, ["resume", str(folder)])
    assert result.exit_code == 0 or "this run is done" in result.stderr, result.stderr
    return folder


@FEW
@given(data=st.data())
def test_killed_anywhere_and_resumed_is_as_never_stopped(whole, data):
    folder, count = whole
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        number = data.draw(st.integers(1, count))
        code, reached = forked(words(runs), runs, number, room=True)
        assert (code, reached) == (KILLED, number)
        found = resumed(runs)
        assert invoke("runs", "--runs-dir", runs).exit_code == 0
        if found:
            assert_same_end(found, folder)


@FEW
@given(data=st.data())
def test_a_disk_that_fills_anywhere_loses_nothing(whole, data):
    folder, count = whole
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        code, _ = forked(words(runs), runs, data.draw(st.integers(1, count)), room=False)
        assert code in (0, 1), code
        found = resumed(runs)  # there is room again
        if found:
            assert_same_end(found, folder)
        elif code == 0:
            raise AssertionError("a run that was done is not there")


def test_a_run_that_is_cut_off_is_not_as_whole(whole, tmp_path):
    """Negative control: without resuming, the ends differ."""
    folder, count = whole
    code, _ = forked(words(tmp_path / "runs"), tmp_path / "runs", count // 2, room=True)
    assert code == KILLED
    (found,) = (tmp_path / "runs").glob("*/*")
    with pytest.raises(AssertionError):
        assert_same_end(found, folder)
    shutil.rmtree(found)
