"""What starting costs: processor seconds of a process from its start to its end, or to its first line.

Relative to `python -c 'import torch'`, the least that anything of torch can take. Bytecode is
written, and the first round, which writes it, is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.environments import PEERS, python_of
from tests.benchmarks.measured import Measured, Method
from tests.benchmarks.rows import COMMANDS

FLOOR = "import torch"
MODULES = {"betty-ml": "betty.problems", "boat-torch": "boat_torch", "jax": "jaxopt"}
"""What is imported of a library whose name is another."""


def commands(row: str, cache: Path) -> dict[str, list[str]]:
    """What the methods of a row run."""
    found = {
        FLOOR: [sys.executable, "-c", "import torch"],
        "bilevel": [sys.executable, *COMMANDS[row]],
    }
    if row == "start-up, import":
        for peer in PEERS:
            words = ["-c", f"import {MODULES.get(peer, peer)}"]
            found[peer] = [str(python_of(peer, cache)), *words]
    return found


def measure(row: str, rounds: int, cache: Path) -> Measured:
    """The commands of a row in turn."""
    scratch, seconds = cache / "start-up", {}
    scratch.mkdir(parents=True, exist_ok=True)
    for _ in range(rounds + 1):
        for name, command in commands(row, cache).items():
            is_run = row == "start-up, run" and name == "bilevel"
            spent = until_first_line(command, scratch) if is_run else until_end(command, scratch)
            seconds.setdefault(name, []).append(spent)
    return Measured(row, FLOOR, [Method(name, each[1:]) for name, each in seconds.items()])


def _started(command: list[str], scratch: Path) -> subprocess.Popen[bytes]:
    """In a folder of its own, so that no run folder is left behind."""
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | settings
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=scratch, env=env, stdout=subprocess.PIPE, stderr=quiet)


def until_end(command: list[str], scratch: Path) -> float:
    """Processor seconds, user and system.

    Raises:
        RuntimeError: the command failed.
    """
    process = _started(command, scratch)
    assert process.stdout
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def until_first_line(command: list[str], scratch: Path) -> float:
    """Processor seconds until a line is out; in ticks of the kernel, which are 10 ms as a rule.

    Raises:
        RuntimeError: the command ended without one.
    """
    process = _started(command, scratch)
    assert process.stdout
    line = process.stdout.readline()
    after = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    process.kill()
    process.communicate()
    if not line.strip():
        raise RuntimeError(f"{' '.join(command)}: ended without a line")
    return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")
