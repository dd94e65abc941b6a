"""Cells in processes of their own: their memory, their deaths, and their end with the command."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bilevel.comparing import launch
from tests.comparing.cells import GREEDY, variant

ENDS = """
import os, signal, time
from pathlib import Path
from bilevel.estimators.implicit import Implicit
class Killed:
    claim, needs = None, Implicit().needs
    def init(self, at): return {}
    def estimate(self, losses, at, state): os.kill(os.getpid(), signal.SIGKILL)
class Waits(Killed):
    def estimate(self, losses, at, state):
        Path(__file__).with_name("alive").write_text(f"{os.getpid()} {os.getsid(0)}")
        time.sleep(60)
"""


def launched(quadratic, points, folder: Path, name: str, **options) -> dict:
    """What `launch.run` finds of an estimator in `folder`/ends.py."""
    made = variant(quadratic, it={"name": f"{folder / 'ends.py'}:{name}", **options})["it"]
    (folder / "it.yaml").write_text(made.dump())
    spec = {"kind": "cell", "recipe": str(folder / "it.yaml"), "folder": str(points)}
    return launch.run(spec | {"budget": 20, "result": str(folder / "it.json")})


def test_a_process_of_its_own_measures_the_same_memory(quadratic, points, tmp_path):
    (tmp_path / "ends.py").write_text(GREEDY)
    much = launched(quadratic, points, tmp_path, "Greedy")
    little = launched(quadratic, points, tmp_path, "Greedy", megabytes=0)
    assert much["status"] == "ok"
    seen = much["estimate"]["memory"] - little["estimate"]["memory"]
    assert seen == pytest.approx(200e6, rel=0.2)
    assert little["estimate"]["memory"] < 20e6  # nothing of the one before it


def test_one_that_is_killed_takes_nothing_with_it(quadratic, points, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS + GREEDY)
    assert launched(quadratic, points, tmp_path, "Killed") == {
        "status": "failed",
        "reason": "the process was killed by SIGKILL (out of memory?)",
    }
    assert launched(quadratic, points, tmp_path, "Greedy", megabytes=0)["status"] == "ok"


def test_a_process_ends_with_the_command(quadratic, points, tmp_path):
    """A signal that the command handles by raising ends the process, which no terminal reaches."""
    (tmp_path / "ends.py").write_text(ENDS)
    alive = tmp_path / "alive"

    def stop() -> None:
        while not alive.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # which a shell has ignored in what it runs in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launched(quadratic, points, tmp_path, "Waits")
    finally:
        signal.signal(signal.SIGINT, before)
    process, session = map(int, alive.read_text().split())
    assert process == session  # so that Ctrl-C does not reach it by itself
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
