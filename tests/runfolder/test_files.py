"""The one atomic write: all of what is new or all of what was there, and nothing beside it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel import report
from bilevel.comparing import files as comparing_files
from bilevel.errors import CheckpointError
from bilevel.runfolder import files, record
from bilevel.runfolder.folder import RunFolder


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path):
    path = tmp_path / "new folder" / "a.txt"
    for text in ("old\n", "new, and ∂\n"):
        files.write_text(path, text, remedy="none", make_folder=True)
        assert path.read_text(encoding="utf-8") == text
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


def half_written(path: Path, error: type[BaseException]) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text("ha")
        raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_writer_that_raises_half_way_leaves_the_old_file(error, tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        half_written(path, error)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "model"

    def write(*, fails: bool) -> None:
        with files.replacing(path) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "a.txt").write_text("a")
            if fails:
                raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write(fails=True)
    assert not list(tmp_path.iterdir())
    write(fails=False)
    assert (path / "deep" / "a.txt").read_text() == "a"
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


def test_a_folder_takes_no_full_folders_place(tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"), files.replacing(path) as temporary:
        temporary.mkdir()
    assert [found.name for found in tmp_path.rglob("*")] == ["model", "mine.txt"]


HALF = """
import os, sys
from pathlib import Path
from bilevel.runfolder import files
path = Path(sys.argv[1])
def half(path):
    path.write_text("ha")
    os._exit(9)
if sys.argv[2] == "replacing":
    with files.replacing(path) as temporary:
        half(temporary)
half(path)
"""


def killed_half_way(path: Path, how: str) -> str:
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", HALF, str(path), how], check=False)
    assert done.returncode == 9
    return path.read_text()


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    assert killed_half_way(path, "replacing") == "old"
    assert len(list(tmp_path.iterdir())) == 2  # what it was writing, which it could not remove
    files.remove_temporaries(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_plain_write_does_not(tmp_path: Path):  # negative control
    assert killed_half_way(tmp_path / "a.txt", "plainly") == "ha"


def test_who_takes_the_lock_removes_what_a_killed_process_was_writing(tmp_path: Path):
    left = tmp_path / f"{files.TEMPORARY}1-report.html"
    left.write_text("ha")
    with RunFolder(tmp_path).lock():
        assert not left.exists()


EVENT = {"event": "seen", "step": 1}
WRITERS = {
    "a record that is cut": (record.FILE, lambda folder: record.cut(folder, 0), "resume"),
    "a comparison": (
        "cell.json",
        lambda folder: comparing_files.write(folder / "cell.json", EVENT),
        "--runs-dir",
    ),
    "a report": ("report.html", lambda folder: report.write(RunFolder(folder)), "write it again"),
}


@pytest.mark.parametrize("failing", ["write_text", "fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_with_a_remedy(writer, failing, tmp_path: Path, monkeypatch):
    name, write, remedy = WRITERS[writer]
    if writer == "a report" and report.missing():
        pytest.skip("without the extra report")
    if writer == "a report":
        monkeypatch.setattr("bilevel.report.page.render", lambda folder: "new")
    path = tmp_path / name
    path.write_text(record.line(EVENT))

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os if failing == "fsync" else Path, failing, full)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be written: No space left on device; make room")
    assert remedy in message
    assert path.read_text() == record.line(EVENT)
    assert [found.name for found in tmp_path.iterdir()] == [name]
    write(tmp_path)  # negative control: with room it is written
    assert path.read_text() != record.line(EVENT)
