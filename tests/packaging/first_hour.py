"""A first hour, typed at a terminal: `python -m tests.packaging.first_hour BILEVEL`.

From nothing to a report, an own problem, a comparison and a sweep, with the installed command in an
empty folder, 80 columns wide. Each step says what must be on the screen, and what must lie on the disk.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import pexpect

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
LIMIT = 300
"""Seconds after which a command is taken to hang; no measure of speed."""


class Terminal:
    """A terminal of 80 columns in a folder, where one command is typed after another."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self.env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(self, *words: str) -> pexpect.spawn:
        print(f"$ bilevel {' '.join(words)}", flush=True)
        return pexpect.spawn(
            self.command,
            list(words),
            cwd=str(self.folder),
            env=self.env,
            dimensions=(24, 80),
            encoding="utf-8",
            timeout=LIMIT,
        )

    def type(self, *words: str, code: int = 0, shows: tuple[str, ...] = ()) -> str:
        """What a command shows; it must end with `code` and show each of `shows`."""
        return finish(self.start(*words), code, shows)


def finish(process: pexpect.spawn, code: int, shows: tuple[str, ...]) -> str:
    process.expect(pexpect.EOF)
    process.close()
    screen = ESCAPES.sub("", (process.before or "").replace("\r", ""))
    ended = process.exitstatus if process.signalstatus is None else -process.signalstatus
    missing = [text for text in shows if text not in screen]
    if ended != code or missing or "Traceback" in screen:
        raise SystemExit(f"exit code {ended}, not {code}; not shown: {missing}\n{screen}")
    return screen


def main(command: str) -> None:
    """Exit with the first step that goes wrong and its screen."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        terminal = Terminal(folder, command)
        look_around(terminal)
        run_and_resume(terminal, folder)
        own_problem(terminal, folder)
        many_runs(terminal, folder)


def look_around(terminal: Terminal) -> None:
    terminal.type("--version", shows=("bilevel 0.",))
    terminal.type("--help", shows=("run", "sweep", "new"))
    terminal.type("doctor", shows=("torch",))
    terminal.type("ls", shows=("quadratic", "implicit"))
    terminal.type("show", "cg", shows=("iterations",))
    terminal.type("validate", "quadratic", "upper.stps=3", code=2, shows=("Did you mean 'steps'?",))


def run_and_resume(terminal: Terminal, folder: Path) -> None:
    terminal.type("run", "quadratic", "upper.steps=20", shows=("done at step 20", "x held"))
    process = terminal.start("run", "hyper_cleaning", "upper.steps=400", "evaluate.held=false")
    process.expect("dΦ/dx")
    process.expect(r"\d")
    process.kill(signal.SIGINT)
    finish(process, 130, ("bilevel resume",))
    terminal.type("runs", shows=("interrupted", "done"))
    assert len(list(folder.glob("runs/*/*/checkpoints/step-*"))) >= 2
    terminal.type("report", "quadratic", shows=("report.html",))
    assert list(folder.glob("runs/quadratic/*/report.html"))


def own_problem(terminal: Terminal, folder: Path) -> None:
    terminal.type("new", "problem", "mine", shows=("mine.py", "bilevel run mine.yaml"))
    terminal.type("check", "mine.yaml", "--estimators", "implicit,one_step", shows=("exact",))
    terminal.type("run", "mine.yaml", "upper.steps=10", shows=("done at step 10",))
    source = folder / "mine.py"
    source.write_text(source.read_text().replace('batch["A"] @', 'batch["B"] @'))
    terminal.type("run", "mine.yaml", code=7, shows=("KeyError", "mine.py"))
    source.write_text(source.read_text().replace('batch["B"] @', 'batch["A"] @'))


def many_runs(terminal: Terminal, folder: Path) -> None:
    estimators = ("--estimators", "implicit,unroll")
    terminal.type("compare", "quadratic", "upper.steps=4", *estimators, shows=("unroll",))
    sweep = ("sweep", "mine.yaml", "upper.optimizer.lr=1e-2..1,log", "upper.steps=5")
    terminal.type(*sweep, "--trials", "3", "--measure", "error", shows=("best.yaml",))
    terminal.type("run", "quadratic", "upper.steps=5", "seeds=0..1", shows=("seed",))
    terminal.type("report", "quadratic", "mine", "-o", "all.html", shows=("all.html",))
    assert (folder / "all.html").is_file()


if __name__ == "__main__":
    main(sys.argv[1])
