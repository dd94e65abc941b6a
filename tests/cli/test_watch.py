"""`runs --watch`: a run of another process, to its end."""

import io
import threading

import pytest
from rich.console import Console

from bilevel.cli import watch as module
from bilevel.errors import RecipeError
from bilevel.runfolder import RunFolder, record
from tests.cli.commands import invoke
from tests.report.records import write


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return write(tmp_path, "toy/a", [3.0, 2.0, 1.0], measures={"gap": (5.0, 0.25)}, warned="beware")


def watched(runs, reference="", width=80) -> list[str]:
    out = io.StringIO()
    module.watch(Console(file=out, width=width), reference, runs, [])
    return out.getvalue().splitlines()


def test_a_run_that_has_ended_is_told_with_its_end(folder, tmp_path):
    said = watched(tmp_path, "toy")
    assert said[0] == f"{folder.path}/"
    assert said[1] == "quadratic 1/3  1.0s left  F 3.000e+00  G 1.500e+00  ‖dΦ/dx‖ 2.5e-01".replace(
        "quadratic", "toy"
    )
    assert said[4:] == [
        "done at step 3 of 3",
        "upper loss F 1",
        "gap 0.25, 5 before",
        "warned: beware",
    ]


@pytest.mark.parametrize(("at", "said"), [(2, "gap 0.25 at step 2, 5 before"), (0, "gap 5 before")])
def test_measures_of_an_earlier_step_say_so(at, said, folder, tmp_path):
    path = folder.path / record.FILE
    lines = path.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if '"evaluated", "step": 3' in line)
    moved = lines.pop(place).replace('"step": 3', f'"step": {at}')
    if at:
        lines.insert(4, moved)
    path.write_text("".join(lines))
    assert watched(tmp_path, "toy")[6] == said


def test_it_follows_one_that_is_running_until_its_end(folder, tmp_path, monkeypatch):
    path = folder.path / record.FILE
    whole = path.read_bytes()
    torn = whole.index(b'"stepped", "step": 2') + 5
    path.write_bytes(whole[:torn])
    looked = threading.Semaphore(0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: looked.release())

    def go_on() -> None:
        looked.acquire()  # it has seen what was there, a line that was not whole among it
        with path.open("ab") as file:
            file.write(whole[torn:])

    with folder.lock():
        writer = threading.Thread(target=go_on)
        writer.start()
        said = watched(tmp_path)  # the newest that is running
        writer.join()
    assert [line.split()[1] for line in said[1:4]] == ["1/3", "2/3", "3/3"]
    assert said[4] == "done at step 3 of 3"


def test_one_that_dies_without_a_word_is_left(folder, tmp_path):
    path = folder.path / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert "stopped without a word of its end at step 2 of 3" in watched(tmp_path, "toy")


def test_where_none_is_running(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"no run in .* is running"):
        watched(tmp_path)


def test_a_narrow_terminal_has_what_fits(folder, tmp_path):
    seen = module._Watched()
    for event in record.read(folder.path):
        seen.takes(event)
    assert seen.line(40) == "toy 3/3  0.0s left  F 1.000e+00"
    assert len(seen.line(60)) <= 60
    assert seen.line(5) == "toy 3/3"


@pytest.mark.parametrize(
    "words",
    [
        ("--watch", "toy", "--runs-dir", "HERE"),
        ("--runs-dir", "HERE", "--watch", "toy"),
    ],
)
def test_the_option_takes_a_run(folder, tmp_path, words):
    words = [tmp_path if word == "HERE" else word for word in words]
    assert "done at step 3 of 3" in invoke("runs", *words).output


@pytest.mark.parametrize("last", [("--watch",), ("--watch", "--where", "status=running")])
def test_the_option_stands_alone(folder, tmp_path, last):
    assert "is running" in invoke("runs", "--runs-dir", tmp_path, *last, code=2).stderr


def test_a_record_that_became_shorter_is_read_again(folder):
    events, position = record.read_from(folder.path, 0)
    assert len(events) == len(list(record.read(folder.path)))
    assert record.read_from(folder.path, position) == ([], position)
    (folder.path / record.FILE).write_text('{"event": "saved", "step": 1}\n')
    events, position = record.read_from(folder.path, position)
    assert [event["event"] for event in events] == ["saved"]
    assert record.read_from(folder.path.parent, 3) == ([], 0)


def test_ctrl_c_leaves_quietly_and_the_run_goes_on(folder, tmp_path, monkeypatch):
    path = folder.path / record.FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with folder.lock():
        result = invoke("runs", "--watch", "--runs-dir", tmp_path, code=130)
        assert folder.is_locked()
    assert "toy 2/3" in result.output
    assert result.stderr == ""
