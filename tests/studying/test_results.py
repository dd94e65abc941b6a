"""What is kept of a run, and read again; a damaged file is said, and costs no other cell."""

import json
import math

import pytest

from bilevel.errors import CheckpointError
from bilevel.runfolder import record
from bilevel.studying.file import Cases
from bilevel.studying.results import Book, Kept, StudyCell, collect

CELL = StudyCell("R1", "uniform", "tune", 3, trial=2)
CASES = Cases(table="questions", unit="id", score="score", label="answer", where={"group": "hard"})
ROWS = [
    {"id": "p7", "group": "hard", "answer": True, "score": 0.1234567},
    {"id": "p7", "group": "easy", "answer": True, "score": 9.0},
    {"id": "p2", "group": "hard", "answer": False, "score": -1.0},
    {"id": "p7", "group": "hard", "answer": False, "score": 2.0},
]


@pytest.fixture
def run(tmp_path):
    """The record of a run that is over."""
    stepped = {"event": "stepped", "step": 1, "upper_loss": 2.0, "lower_loss": 0.5, "seconds": 0.1}
    stepped |= {"hypergradient_norm": 1.0, "estimate": {}, "totals": {"gradients": 7.0}}
    metrics = {"hard/auc": 0.123456789, "hard/accuracy": 0.5, "easy/auc": 0.9, "gone": "NaN"}
    events = [
        stepped,
        {"event": "evaluated", "step": 1, "metrics": metrics},
        {"event": "finished", "step": 1, "reason": "done", "seconds": 3.14159},
    ]
    (tmp_path / record.FILE).write_text("".join(map(record.line, events)), "utf-8")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "questions.jsonl").write_text("".join(map(record.line, ROWS)), "utf-8")
    return tmp_path


def test_measures_costs_and_cases_of_a_run_are_kept(run, tmp_path):
    found = collect(run, "hard/auc", ["*/accuracy", "gone"], CASES)
    assert math.isnan(found.measures["gone"])
    assert {name: value for name, value in found.measures.items() if name != "gone"} == {
        "upper_loss": 2.0,
        "lower_loss": 0.5,
        "hard/auc": 0.1234568,
        "hard/accuracy": 0.5,
    }
    assert (found.status, found.totals, found.seconds) == ("done", {"gradients": 7.0}, 3.14)
    assert found.cases == {"unit": [0, 1, 0], "score": [0.12346, -1.0, 2.0], "label": [1, 0, 0]}
    book = Book(tmp_path / "results")
    path = book.keep(CELL, found)
    assert path == tmp_path / "results" / "R1" / "uniform" / "tune-trial02-seed3.json"
    again = Book(book.folder).get(CELL)
    assert again is not None
    assert repr(again) == repr(found)  # NaN is not equal to itself
    book.drop(CELL)
    assert book.get(CELL) is None


@pytest.mark.parametrize(
    ("measure", "cases", "said"),
    [
        ("auc", CASES, "measure 'auc': the run has none of that name; it has .*hard/auc"),
        ("gone", CASES, "gone is nan at the end"),
        ("hard/auc", Cases(table="answers", unit="id", score="s"), "no table 'answers'"),
        ("hard/auc", Cases(table="questions", unit="id", score="s"), "no column 's'; it has id,"),
        (
            "hard/auc",
            Cases(table="questions", unit="id", score="score", where={"group": "no"}),
            "no row",
        ),
    ],
)
def test_what_the_run_has_not_is_said(run, measure, cases, said):
    with pytest.raises(ValueError, match=said):
        collect(run, measure, ["gone"], cases)


def test_what_is_not_finite_is_read_again(tmp_path):
    book = Book(tmp_path)
    book.keep(CELL, Kept("done", ("a=1",), {"m": float("inf")}, {}, 1.0))
    found = Book(tmp_path).get(CELL)
    assert found is not None
    assert found.measures["m"] == float("inf")
    assert found.assignments == ("a=1",)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"status": "done"}', '{"nonsense": 1}'])
def test_a_damaged_file_is_said_with_what_to_do(tmp_path, text):
    book = Book(tmp_path)
    book.keep(CELL, Kept("done", (), {}, {}, 1.0)).write_text(text)
    with pytest.raises(CheckpointError, match=r"seed3.json: is not the result .* delete it"):
        Book(tmp_path).get(CELL)


def test_a_file_is_json_with_a_line_each_part(tmp_path):
    path = Book(tmp_path).keep(CELL, Kept("failed", ("a=1",), {}, {}, 0.0, "it diverged"))
    assert json.loads(path.read_text())["reason"] == "it diverged"
    assert len(path.read_text().splitlines()) == 8
