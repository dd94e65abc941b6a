"""Standard output that is closed, full, read no further or in another encoding; whole commands on each."""

import io
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bilevel import cli
from bilevel.cli.output import ERRORS, Unbroken, going_on, unbroken
from bilevel.runfolder import checkpoint, record
from tests.cli.commands import SHORT, run

COMMANDS = {
    "ls": ["ls"],
    "runs": ["runs"],
    "validate": ["validate", "quadratic"],
    "check": ["check", "quadratic", "--estimators", "implicit"],
    "dry run": ["run", "quadratic", "--dry-run"],
}


def unread() -> int:
    """The end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def main(monkeypatch, arguments, descriptor: int, encoding: str = "utf-8") -> int:
    """The exit code of the command line with that standard output, which is as a process has it."""
    stream = io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding=encoding, write_through=True)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["bilevel", *map(str, arguments)])
            patched.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as end:
                cli.main()
    finally:
        with suppress(OSError):
            stream.close()
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_printed_is_a_code_and_one_line(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name != "check":  # whose estimates take a while
        assert main(monkeypatch, COMMANDS[name], unread()) == 141
        assert capsys.readouterr().err == ""
    assert main(monkeypatch, COMMANDS[name], full()) == 1
    said = capsys.readouterr().err
    assert said == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [(["show", "implicit"], "grad y G"), (COMMANDS["check"], "|h - dPhi/dx|")],
)
def test_signs_that_an_encoding_lacks_are_spelled(
    arguments, spelled, encoding, monkeypatch, tmp_path
):
    path = tmp_path / "out"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    assert main(monkeypatch, arguments, descriptor, encoding) == 0
    assert spelled in " ".join(path.read_text(encoding=encoding).split())


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("λμ ≤ Φ·½…", "lambdamu <= Phi*1/2..."),
        ("∇²ᵀ xᵢ é", "grad ^2^T xi e"),
        ("\udcff⊗", "??"),
        ("plain", "plain"),
    ],
)
def test_spelling(text, spelled):
    with unbroken():
        assert text.encode("ascii", ERRORS).decode() == spelled


@pytest.mark.parametrize("output", [unread, full])
def test_a_run_goes_on_without_its_console(output, monkeypatch, capsys, runs, tmp_path):
    seen = run(tmp_path / "seen")
    words = ["run", "quadratic", *SHORT, "--runs-dir", runs]
    assert main(monkeypatch, words, output()) == 0
    (folder,) = runs.glob("*/*")
    said = capsys.readouterr().err
    assert said.count("\n") == said.count(f"the run in {folder} goes on") == 1
    assert (record.last(folder) or {})["reason"] == "done"
    states = [checkpoint.load(each / "checkpoints/step-00000004") for each in (seen, folder)]
    torch.testing.assert_close(states[0]["y"], states[1]["y"], rtol=0, atol=0)


def test_a_loss_is_told_once_and_later_writes_go_nowhere():
    told = []
    stream = Unbroken(unread(), told.append)
    assert [stream.write(b"one"), stream.write(b"three")] == [3, 5]
    assert [type(error) for error in told] == [BrokenPipeError]
    read, write = os.pipe()  # negative control
    stream = Unbroken(write, told.append)
    assert stream.write(b"one") == 3
    assert os.read(read, 9) == b"one"
    assert len(told) == 1


def test_a_pipe_that_is_full_and_never_blocks_is_waited_for():
    read, write = os.pipe()
    os.set_blocking(write, False)
    size, got = 300_000, []  # some five times what the pipe holds

    def drain() -> None:
        while sum(map(len, got)) < size:
            got.append(os.read(read, size))

    reader = threading.Thread(target=drain)
    with io.BufferedWriter(Unbroken(write, lambda error: None)) as stream:
        reader.start()
        stream.write(b"x" * size)
    reader.join()
    assert sum(map(len, got)) == size


def test_a_print_of_the_problems_own_is_guarded_too(monkeypatch, capsys):
    stream = io.TextIOWrapper(io.FileIO(unread(), "w"), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        with stream, unbroken(), going_on("the run"):
            print("λ" * 100_000)
    assert capsys.readouterr().err == "warning: standard output: Broken pipe; the run goes on\n"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `bilevel` is the real command, in a process of its own."""
    python = f'"{sys.executable}" -c "from bilevel.cli import main; main()"'
    return subprocess.run(
        ["bash", "-c", f'bilevel() {{ {python} "$@"; }}; {line}'],
        capture_output=True,
        text=True,
        check=False,
    )


def test_streams_that_are_closed_are_as_the_null_device(tmp_path: Path):
    """Python leaves None for a closed stream, and gives its number to the next file that is opened."""
    assert shell("bilevel ls >&-").returncode == 0
    result = shell("bilevel ls nothing >&- 2>&- <&-")
    assert (result.returncode, result.stderr) == (2, "")


def test_a_run_whose_output_is_piped_into_head_runs_to_its_end(runs):
    line = f"bilevel run quadratic upper.steps=30 report=false --runs-dir {runs} | head -n 1"
    result = shell(f"{line}; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    (folder,) = runs.glob("*/*")
    assert (record.last(folder) or {})["step"] == 30
