"""`runs rm` deletes what was asked for and nothing else."""

import pytest

from bilevel.cli.app import app
from bilevel.runfolder import RunFolder
from tests.cli.commands import RUNNER, invoke
from tests.report.records import write


@pytest.fixture
def runs(tmp_path):
    for run in ("toy/a", "toy/b", "ridge/c"):
        write(tmp_path / "runs", run, [1.0], estimator="unroll" if run == "toy/b" else "implicit")
    return tmp_path / "runs"


def left(runs) -> list[str]:
    return sorted(str(path.relative_to(runs)) for path in runs.glob("*/*"))


def remove(runs, *arguments, code=0, answer=None):
    words = ["runs", "rm", "--runs-dir", runs, *arguments]
    result = RUNNER.invoke(app, [str(word) for word in words], input=answer)
    assert result.exit_code == code, (result.output, result.stderr)
    return result


def test_it_asks_and_takes_no_for_an_answer(runs):
    for answer in ("n\n", "\n", ""):
        result = remove(runs, "toy/a", answer=answer, code=1)
        assert str(runs / "toy/a") in result.output
        assert "Delete 1 run? [y/N]" in result.output
    assert left(runs) == ["ridge/c", "toy/a", "toy/b"]
    remove(runs, "toy/a", answer="y\n")
    assert left(runs) == ["ridge/c", "toy/b"]


def test_a_name_stands_for_all_its_runs_and_an_empty_folder_goes_too(runs):
    assert "deleted 2 runs" in remove(runs, "toy", "--yes").output
    assert [path.name for path in runs.iterdir()] == ["ridge"]


def test_conditions_choose(runs):
    remove(runs, "--where", "estimator=unroll", "-y")
    assert left(runs) == ["ridge/c", "toy/a"]
    remove(runs, "toy", "--where", "estimator=unroll", "-y", code=2)
    assert left(runs) == ["ridge/c", "toy/a"]


def test_nothing_is_asked_for(runs):
    assert "name the runs to delete" in remove(runs, "--yes", code=2).stderr
    assert len(left(runs)) == 3


def test_a_running_one_is_refused_and_nothing_is_deleted(runs):
    with RunFolder(runs / "toy/b").lock():
        assert "toy/b: is running" in remove(runs, "toy", "--yes", code=2).stderr
    assert left(runs) == ["ridge/c", "toy/a", "toy/b"]


def test_no_name_escapes_the_folder_of_runs(runs, tmp_path, monkeypatch):
    outside = write(tmp_path / "elsewhere", "toy/z", [1.0]).path
    monkeypatch.chdir(tmp_path)
    for name in (outside, outside.parent, "elsewhere/toy/z", runs / "../elsewhere/toy/z", runs):
        remove(runs, name, "--yes", code=2)
    remove(runs, "../elsewhere/*", "--yes", code=2)
    assert outside.is_dir()
    assert len(left(runs)) == 3


def test_the_folder_of_runs_may_lie_anywhere(runs, monkeypatch):
    monkeypatch.chdir(runs / "toy")
    remove("..", "ridge/c", "--yes")
    remove("../../runs", "toy/a/../b", "--yes", code=2)
    remove("../../runs", "toy/b", "--yes")
    assert left(runs) == ["toy/a"]


def test_no_link_is_followed(runs, tmp_path):
    outside = write(tmp_path / "elsewhere", "toy/z", [1.0]).path
    (runs / "toy/link").symlink_to(outside)
    (runs / "linked").symlink_to(outside.parent)
    for name in ("toy/link", "linked/z", "linked"):
        assert "link" in remove(runs, name, "--yes", code=2).stderr
    assert "link" in remove(runs, "--where", "status=done", "--yes", code=2).stderr
    assert (outside / "resolved.yaml").is_file()
    (runs / "toy/link").unlink()
    (runs / "toy/a/figures").symlink_to(outside)  # a link within a run goes, what it leads to stays
    remove(runs, "toy/a", "--yes")
    assert (outside / "resolved.yaml").is_file()
    assert left(runs) == ["linked/z", "ridge/c", "toy/b"]


def test_a_damaged_one_can_be_deleted(runs):
    (runs / "toy/a/events.jsonl").write_text("{torn\n")
    (runs / "toy/b/resolved.yaml").write_text("")
    remove(runs, "--where", "status=damaged", "--yes")
    assert left(runs) == ["ridge/c"]


def test_runs_is_there_without_them(runs):
    assert "toy/b" in invoke("runs", "--runs-dir", runs).output
