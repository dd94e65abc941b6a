"""Do mypy and pyright see the types of the installed package? `python -m tests.packaging.types_seen PYTHON`.

Both are to find the lines of `typed_user.py` that say "wrong", and nothing else. PYTHON has the wheel
installed; a checkout installed with -e is found through a hook that neither follows.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

USER = Path(__file__).with_name("typed_user.py")


def main(python: str) -> None:
    """Exit with what differs; silence is consent."""
    wrong = {
        number
        for number, line in enumerate(USER.read_text(encoding="utf-8").splitlines(), 1)
        if "# wrong: " in line
    }
    assert len(wrong) == 3
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # away from the checkout, whose sources would be read
        copied = shutil.copy(USER, folder)
        for checker in (mypy, pyright):
            said = checker(python, copied)
            if said.keys() != wrong:
                raise SystemExit(f"{checker.__name__} objects to {said}; expected lines {wrong}")


def mypy(python: str, file: str) -> dict[int, str]:
    options = ["--python-executable", python, "--no-error-summary", "--cache-dir", f"{file}.cache"]
    lines = run(sys.executable, "-m", "mypy", *options, file).splitlines()
    found = (re.match(r"[^:]*:(\d+): error: (.*)", line) for line in lines)
    return {int(match[1]): match[2] for match in found if match}


def pyright(python: str, file: str) -> dict[int, str]:
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, file)
    found = json.loads(run(*command))["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found}


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(command[-1]).parent)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
