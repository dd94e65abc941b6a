"""What a command imports is not looked through for garbage; what comes later is, as ever."""

import gc
import subprocess
import sys

import pytest

from bilevel.cli.importing import importing
from bilevel.cli.options import settings
from tests.cli.commands import invoke

MINE = """
import gc
from bilevel_problems.quadratic import Quadratic

assert gc.isenabled()


class Log:
    def __init__(self):
        self.file, self.me = open("said.txt", "w"), self
        self.file.write("held in a circle, and never closed")


class Mine(Quadratic):
    def project_upper(self, x):
        return x


log = Log()
"""


def test_a_process_does_not_look_through_what_it_has_imported(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text("problem: mine.py:Mine\n")
    code = (
        "import atexit, gc, sys\n"
        "from bilevel.cli import main\n"
        "sys.argv = ['bilevel', 'validate', 'mine.yaml']\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count(), gc.isenabled()))\n"
        "main()"
    )
    end = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said, frozen, is_on = end.stdout.split()[-3:]
    assert (said, is_on) == ("frozen", "True")
    assert int(frozen) > 100_000
    # an object of the user's own code ends as it does in any other process
    assert (tmp_path / "said.txt").read_text() == "held in a circle, and never closed"


def test_a_program_that_calls_a_command_keeps_its_garbage_collected():
    before = gc.get_freeze_count()
    invoke("validate", "quadratic")
    assert gc.get_freeze_count() == before
    assert gc.isenabled()


@pytest.mark.parametrize("is_on", [True, False])
def test_collecting_is_afterwards_as_it_was(is_on, monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(settings, "is_whole_process", True)
    (gc.enable if is_on else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), importing():
            1 / gc.isenabled()
        assert gc.isenabled() == is_on
        assert frozen == [True]
    finally:
        gc.enable()
